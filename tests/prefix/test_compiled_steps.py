"""Steps behind shared prefixes compile to one graph between changes of the tree."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._guards import TracingContext

from kvcompress import GEARCache, H2OCache, HydragenCache
from kvcompress.hf import cache_argument
from tests.contract.drive import compiled_apart, counting_graphs, feed
from tests.contract.models import DEVICE, left_padded, prompt, tiny
from tests.contract.test_compile import ONE_LAYER, STEPS, TWO_LAYERS, addresses, decode, step_function
from tests.prefix.rows import PREFIX, ROWS, SUFFIXES, TREE

FEW = 12


# of these one case may run what another has compiled
SHARING = (
    "test_steps_behind_a_changed_tree_are_those_of_eager_mode",
    "test_a_compiled_step_must_be_made_ready_after_the_tree_or_the_suffixes_changed",
)


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    yield from compiled_apart(request, SHARING)


def tree(model, **settings):
    return HydragenCache.from_tree(model, *TREE, ROWS, **settings)


def prefix(model, **settings):
    return HydragenCache.from_prefix(model, PREFIX, **settings)


def begun(model, make, suffixes):
    """A cache that was fed these suffixes, its next tokens [rows, 1] and their positions [rows, 1]."""
    cache = make(model)
    ids, mask = left_padded(suffixes)
    mask = cache.cover(mask)
    token = feed(model, cache, ids, mask)[:, -1:].argmax(-1)
    return cache, token, mask.sum(-1, keepdim=True)


def counting():
    """A compiled step of any model, and what counts its graphs."""
    backend = CompileCounterWithBackend("eager")
    return lambda model: torch.compile(step_function(model), fullgraph=True, backend=backend), backend


def six():
    return [prompt(1 + 3 * row, seed=40 + row)[0] for row in range(len(ROWS))]


# docs: With nodes or without, the steps of a `HydragenCache` are one graph until its tree changes
@pytest.mark.parametrize(
    ("make", "family", "suffixes"),
    [
        (tree, "llama", six()),
        (prefix, "mistral", SUFFIXES),
        pytest.param(prefix, "llama", SUFFIXES, marks=pytest.mark.slow),
        pytest.param(tree, "mistral", six(), marks=pytest.mark.slow),
        pytest.param(prefix, "gemma2", SUFFIXES, marks=pytest.mark.slow),
        pytest.param(prefix, "gpt_oss", SUFFIXES, marks=pytest.mark.slow),
        pytest.param(tree, "qwen3", six(), marks=pytest.mark.slow),
    ],
    ids=lambda given: getattr(given, "__name__", given if isinstance(given, str) else "rows"),
)
def test_a_hundred_steps_behind_nodes_are_one_graph_and_the_tokens_of_eager_mode(make, family, suffixes):
    # the layers of these two are alike
    model = tiny(family, **(TWO_LAYERS if family in ("llama", "mistral") else {}))
    (cache, token, position), (straight, *_) = (begun(model, make, suffixes) for _ in range(2))
    cache.reserve(STEPS)
    compiled, backend = counting()
    before = addresses(cache)
    ours = decode(compiled(model), cache, token, position, STEPS)
    assert addresses(cache) == before
    assert backend.frame_count == 1
    assert torch.equal(ours, decode(step_function(model), straight, token, position, STEPS))
    assert cache.get_seq_length() == straight.get_seq_length()
    assert cache.own_lengths() == straight.own_lengths()
    # and eager mode takes over where the graph left
    ids = prompt(3, len(suffixes))
    found, wanted = (feed(model, each, ids, each.cover(torch.ones_like(ids))) for each in (cache, straight))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def change_rows(cache):
    cache.reorder_cache(torch.arange(cache.batch_size - 1, -1, -1, device=DEVICE))
    return cache


def select_rows(cache):
    cache.batch_select_indices(torch.tensor([3, 1], device=DEVICE))
    return cache


def take_back(cache):
    cache.crop(-3)
    return cache


def take_back_shared(cache):
    cache.crop(-FEW - 8)
    return cache


def fork(cache):
    return cache.fork(2)


def fork_once(cache):
    return cache.fork()


def clone(cache):
    return cache.clone()


def push(cache):
    cache.push(prompt(5, cache.batch_size, seed=8))
    return cache


CHANGES = [change_rows, select_rows, take_back, take_back_shared, fork, fork_once, clone, push]


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_steps_behind_a_changed_tree_are_those_of_eager_mode(change, family):
    model = tiny(family, **ONE_LAYER)
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    results = []
    for run, is_compiled in ((compiled, True), (step_function(model), False)):
        cache, token, position = begun(model, prefix, SUFFIXES)
        cache.reserve(FEW + 4)
        tokens = decode(run, cache, token, position, FEW)
        cache = change(cache)
        cache.reserve(FEW)
        held = torch.tensor([[len(cache.known_ids(row))] for row in range(len(cache.tree.leaves))], device=DEVICE)
        follows = prompt(1, len(held), seed=9)
        results.append((tokens, decode(run, cache, follows, held, FEW), cache.own_lengths(), cache))
        assert is_compiled or not torch.compiler.is_compiling()
    for ours, wanted in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(ours, wanted) if isinstance(ours, torch.Tensor) else ours == wanted
    ids = prompt(2, len(results[0][2]))
    found, wanted = (feed(model, cache, ids, cache.cover(torch.ones_like(ids))) for *_, cache in results)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# docs: by hand `cache.reserve(steps)` does, anew after `fork`, `push` or `crop`
@pytest.mark.parametrize("change", [fork, push, take_back, take_back_shared], ids=lambda change: change.__name__)
def test_a_compiled_step_must_be_made_ready_after_the_tree_or_the_suffixes_changed(change):
    model = tiny(**ONE_LAYER)
    cache, token, position = begun(model, prefix, SUFFIXES)
    cache.reserve(STEPS)
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    decode(compiled, cache, token, position, FEW)
    cache = change(cache)
    rows = len(cache.tree.leaves)
    with pytest.raises(Exception, match=r"call it anew|torch.compiler.disable"), torch.no_grad():
        compiled(prompt(1, rows), torch.full((rows, 1), int(position.max()) + FEW, device=DEVICE), cache)


def test_rows_that_change_places_stay_ready_and_so_does_a_clone():
    model = tiny(**ONE_LAYER)
    cache, token, position = begun(model, tree, six())
    straight, *_ = begun(model, tree, six())
    cache.reserve(STEPS)
    compiled, backend = counting()
    run, eager = compiled(model), step_function(model)
    order = torch.tensor([5, 0, 2, 2, 4, 1], device=DEVICE)
    ours, wanted = (decode(each, of, token, position, 4) for each, of in ((run, cache), (eager, straight)))
    for each in (cache, straight):
        each.reorder_cache(order)
    copied = cache.clone()
    position = (position + 4)[order]
    token = ours[order, -1:]
    for of in (cache, copied):
        assert torch.equal(ours, wanted)
        ours, wanted = decode(run, of, token, position, 4), decode(eager, straight.clone(), token, position, 4)
    assert torch.equal(ours, wanted)
    assert backend.frame_count <= 2


def test_tokens_that_compiled_steps_fed_are_unknown_and_the_others_are_known():
    model = tiny(**ONE_LAYER)
    cache, token, position = begun(model, prefix, SUFFIXES)
    cache.reserve(STEPS)
    decode(counting()[0](model), cache, token, position, 5)
    for row, suffix in enumerate(SUFFIXES):
        assert cache.known_ids(row).tolist() == [*PREFIX.tolist(), *suffix.tolist(), *[-1] * 5]
    cache.crop(-4)
    assert cache.known_ids(1).tolist() == [*PREFIX.tolist(), *SUFFIXES[1].tolist(), -1]


def test_a_cache_may_be_made_ready_before_its_rows_are_known():
    model = tiny()
    cache, straight = prefix(model), prefix(model)
    cache.reserve(STEPS)
    ids, mask = left_padded(SUFFIXES)
    found, wanted = (feed(model, each, ids, each.cover(mask)) for each in (cache, straight))
    assert torch.equal(found, wanted)


def test_a_prefix_is_decoded_behind_without_any_suffix():
    model = tiny(**ONE_LAYER)
    cache, straight = prefix(model), prefix(model)
    cache.reserve(STEPS)
    token, position = prompt(1), torch.full((1, 1), len(PREFIX), device=DEVICE)
    ours = decode(counting()[0](model), cache, token, position, FEW)
    assert torch.equal(ours, decode(step_function(model), straight, token, position, FEW))
    assert cache.own_lengths() == [FEW]


# docs: Nodes made from a cache that compresses are read step by step, uncompiled
@pytest.mark.parametrize(
    "make",
    [
        lambda model: H2OCache(model, budget=24),
        pytest.param(lambda model: GEARCache(model, buffer=16, group_size=8), marks=pytest.mark.slow),
    ],
    ids=["h2o", "gear"],
)
def test_nodes_of_other_caches_are_not_compiled(make):
    model = tiny(**ONE_LAYER)
    donor = make(model)
    feed(model, donor, PREFIX[None])
    cache = HydragenCache.from_cache(donor)
    assert not cache.is_compileable
    cache.reserve(STEPS)
    ids, mask = left_padded(SUFFIXES)
    feed(model, cache, ids, cache.cover(mask))
    assert not cache.is_traceable(1)
    straight = cache.clone()
    token, position = prompt(1, 4), cache.cover(mask[:, :1]).sum(-1, keepdim=True)
    compiled = torch.compile(step_function(model), backend="eager")
    ours, wanted = (
        decode(run, of, token, position, 4) for run, of in ((compiled, cache), (step_function(model), straight))
    )
    assert torch.equal(ours, wanted)


# docs: On a GPU `generate` makes a `HydragenCache` ready by itself
def test_generate_compiles_the_steps_behind_a_prefix():
    model = tiny(**ONE_LAYER)
    ids, mask = left_padded([torch.cat([PREFIX, suffix]) for suffix in SUFFIXES])
    config, graphs = counting_graphs()
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    caches = [HydragenCache(model, ids, mask) for _ in range(2)]
    caches[0].reserve(16)
    assert caches[0].tree.nodes
    found = model.generate(ids, **cache_argument(model, caches[0]), compile_config=config, **options)
    wanted = model.generate(ids, **cache_argument(model, caches[1]), disable_compile=True, **options)
    assert torch.equal(found, wanted)
    # the mask grows by a column, and the room twice
    assert 1 <= len(graphs) <= 5
    assert caches[0].own_lengths() == caches[1].own_lengths()


def test_a_compiled_step_writes_only_to_tensors_that_stay_where_they_are_and_nodes_are_among_them():
    written, pinned, inputs_of = [], [], []

    def compiler(graph, inputs):
        facts = TracingContext.get().fw_metadata
        written.append({index for index, facts in enumerate(facts.input_info) if facts.mutates_data})
        pinned.append(set(facts.static_input_indices))
        inputs_of.append([tuple(each.shape) for each in inputs])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    model = tiny(**ONE_LAYER)
    first, token, position = begun(model, prefix, SUFFIXES)
    first.reserve(STEPS)
    compiled = torch.compile(step_function(model), fullgraph=True, backend=backend)
    for cache in (first.clone(), first):
        with torch.no_grad():
            compiled(token, position, cache)
    assert len(written) == 1, "another cache of the same shapes is compiled anew"
    assert written[0]
    assert written[0] <= pinned[0]
    nodes = {tuple(layer.held[0][0].prefix_keys[0].shape) for layer in first.layers}
    found = [index for index, shape in enumerate(inputs_of[0]) if shape in nodes]
    assert len(found) == 2 * len(first.layers)
    assert set(found) <= pinned[0]
