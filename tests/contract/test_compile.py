"""Decode compiles to one graph that serves every step, with the answers of eager mode."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._guards import TracingContext

from kvcompress import DenseCache, H2OCache, release
from kvcompress.caches.compiled_steps import SteppedLayer
from kvcompress.hf import cache_argument, cache_name
from tests.contract.caches import RESERVED, caches, those, uneven
from tests.contract.drive import assert_same_state, compiled_apart, counting_graphs, feed
from tests.contract.models import DEVICE, END, PAD, build, left_padded, prompt, tiny

# a graph of one layer says as much as one of three, where it is not about what layers share, and else one of two
ONE_LAYER, TWO_LAYERS = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
STEPS = 100


def step_function(model):
    name = cache_name(model)

    def step(token, position, cache):
        return model(token, position_ids=position, **{name: cache}).logits

    return step


def decode(step, cache, token, position, steps):
    """Greedy decoding, token by token, as the compiled decode loop of `generate` does."""
    tokens = []
    with torch.no_grad():
        for _ in range(steps):
            token = step(token, position, cache)[:, -1:].argmax(-1)
            position = position + 1
            tokens.append(token)
    return torch.cat(tokens, 1)


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    yield from compiled_apart(request)


@those(lambda entry: entry.compileable)
def test_the_promise_is_what_transformers_reads(entry):
    assert entry.build(tiny()).is_compileable


# docs: Fixed-capacity caches decode under `torch.compile(fullgraph=True)` as one graph
@caches("h2o", "h2o_packed", "snapkv", "shadowkv", "gear")
@pytest.mark.parametrize("family", ["llama"])
def test_a_hundred_steps_are_one_graph_and_the_tokens_of_eager_mode(entry, family):
    check(entry, family, **TWO_LAYERS)


# docs: Compiled steps do not check for ended rows or positions
def test_a_compiled_step_looks_neither_at_ended_rows_nor_at_positions():
    model = build("llama", **ONE_LAYER)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    ids = prompt(20, 2)
    ids[0, -1] = END
    token, back = torch.tensor([[PAD], [7]], device=DEVICE), torch.tensor([[3], [3]], device=DEVICE)
    step, kept = step_function(model), []
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        for run, position in ((step, back + 17), (compiled, back)):
            cache = H2OCache(model, budget=8)
            feed(model, cache, ids)
            run(token, position, cache)
            # whether each row has taken in what it was fed
            kept.append([20 in row for row in cache.layers[0].slots.positions.flatten(1).tolist()])
        with pytest.raises(ValueError, match="continue from"):
            step(token, back, cache)
    assert kept == [[False, True], [True, True]]


@caches("h2o")
@pytest.mark.parametrize(
    "part",
    [release, pytest.param(lambda model: model.set_attn_implementation("sdpa"), marks=pytest.mark.slow)],
    ids=["release", "set"],
)
def test_a_compiled_step_of_a_model_that_attends_otherwise_by_now_is_refused(entry, part):
    model = build("llama", **TWO_LAYERS)
    cache = entry.build(model)
    token, position = torch.tensor([[3]], device=DEVICE), torch.tensor([[20]], device=DEVICE)
    compiled = torch.compile(step_function(model), backend="eager")
    with torch.no_grad():
        feed(model, cache, prompt(20, 1))
        compiled(token, position, cache)
        part(model)
        with pytest.raises(RuntimeError, match="did not attend through it"):
            compiled(token, position + 1, cache)


@pytest.mark.slow
@those(lambda entry: entry.compileable)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_neox", "qwen3", "phi3", "opt", "gpt_oss", "gemma4"])
def test_it_compiles_in_every_family(entry, family):
    check(entry, family)


@pytest.mark.slow
def test_the_real_model_decodes_two_hundred_steps_in_one_graph(smollm2):
    model, tokenizer = smollm2
    text = "A cache of fixed size decodes in constant memory, however long the text may grow. " * 10
    ids = tokenizer(text, return_tensors="pt").input_ids
    cache, straight = H2OCache(model, budget=64), H2OCache(model, budget=64)
    for each in (cache, straight):
        with torch.no_grad():
            logits = model(ids, **cache_argument(model, each), logits_to_keep=1).logits
    token, position = logits.argmax(-1), torch.tensor([[ids.shape[1]]])
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(step_function(model), fullgraph=True, backend=backend)
    ours = decode(compiled, cache, token, position, 2 * STEPS)
    assert backend.frame_count == 1, f"compiled {backend.frame_count} times"
    assert torch.equal(ours, decode(step_function(model), straight, token, position, 2 * STEPS))


# docs: A `DenseCache` has a fixed capacity once `cache.reserve(steps)` gave it room
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_full_cache_with_room_decodes_a_hundred_steps_as_one_graph(family):
    check(RESERVED, family, **TWO_LAYERS)


def test_a_compiled_step_of_a_full_cache_must_follow_on_compiled_steps_or_on_reserve():
    model = tiny(**ONE_LAYER)
    cache = DenseCache(model)
    assert not cache.is_compileable
    step = step_function(model)
    compiled = torch.compile(step, backend="eager")
    with torch.no_grad():
        feed(model, cache, prompt(20, 2))
        cache.reserve(4)
        assert cache.is_compileable
        token, position = torch.tensor([[3], [5]], device=DEVICE), torch.full((2, 1), 20, device=DEVICE)
        compiled(token, position, cache)
        # it takes in what was compiled, and goes on
        step(token, position + 1, cache)
        assert cache.get_seq_length() == 22
        whole = torch.compile(step, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="call it anew"):
            whole(token, position + 2, cache)
        # a compiled model that may break its graph runs this step as it is
        straight = cache.clone()
        assert torch.equal(compiled(token, position + 2, cache), step(token, position + 2, straight))


# docs: `generate` takes as much room again where it runs out
def test_generate_compiles_the_steps_of_a_full_cache_that_has_room_and_takes_more_where_it_runs_out():
    model = tiny(**ONE_LAYER)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    config, graphs = counting_graphs()
    cache = DenseCache(model)
    cache.reserve(16)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    found = model.generate(ids, **cache_argument(model, cache), compile_config=config, **options)
    assert torch.equal(found, model.generate(ids, **cache_argument(model, DenseCache(model)), **options))
    # the mask grows by a column, and the room once
    assert 1 <= len(graphs) <= 4
    assert cache.get_seq_length() == 59


@pytest.mark.skipif(DEVICE != "cpu", reason="there the device stops, and what comes after it fails too")
def test_a_compiled_step_of_a_full_cache_without_room_is_refused():
    model = tiny(**ONE_LAYER)
    cache = DenseCache(model)
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        feed(model, cache, prompt(300, 2))
        cache.reserve(1)
        room = cache.layers[0].dense.keys.shape[2]
        token, position = torch.tensor([[3], [5]], device=DEVICE), torch.full((2, 1), 300, device=DEVICE)
        for _ in range(room - 300):
            compiled(token, position, cache)
            position = position + 1
        with pytest.raises(RuntimeError, match="no room"):
            compiled(token, position, cache)


def check(entry, family, **sizes):
    if not entry.compileable:
        pytest.skip("not compileable")
    # the experts of gpt_oss compile in float32 alone
    dtype = entry.dtype if entry.packs_between and family != "gpt_oss" else torch.float32
    model = tiny(family, dtype=dtype, **sizes)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    make = entry.between_folds or entry.build
    cache, straight = make(model), make(model)
    if isinstance(getattr(cache, "budget", None), float) and not entry.between_folds:
        pytest.skip("a share grows with the tokens seen, where compiled steps keep to what was granted")
    for each in (cache, straight):
        logits = feed(model, each, ids, mask)
    cache.reserve(STEPS)
    if entry.between_folds:
        # what is reserved is read in other pieces
        straight.reserve(STEPS)
    token, position = logits[:, -1:].argmax(-1), mask.sum(-1, keepdim=True)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(step_function(model), fullgraph=True, backend=backend)

    def step(token, position, cache):
        if entry.packs_between:
            cache.forward_comes()
        return compiled(token, position, cache)

    before = addresses(cache)
    ours = decode(step, cache, token, position, STEPS)
    # in place: what a CUDA graph has recorded it will find again
    assert addresses(cache) == before
    assert backend.frame_count == 1, f"compiled {backend.frame_count} times"
    assert torch.equal(ours, decode(step_function(model), straight, token, position, STEPS))
    assert cache.get_seq_length() == 20 + STEPS
    assert_same_state(entry, cache, straight)
    # and eager mode takes over where the graph left
    found, wanted = feed_on(model, cache, mask), feed_on(model, straight, mask)
    if any(isinstance(layer, SteppedLayer) for layer in cache.layers):
        # compiled steps attend through another function, which sums in another order, and where there are windows in
        # float32; at its rounding errors codes turn over
        torch.testing.assert_close(found, wanted, **({"rtol": 0.01, "atol": 0.01} if entry.packs_between else {}))
    else:
        assert torch.equal(found, wanted)


def test_caches_of_other_budgets_are_compiled_for_one_after_the_other():
    model = tiny(**ONE_LAYER)
    ids = prompt(20, 2)
    token, position = ids[:, -1:], torch.full((2, 1), 20, device=DEVICE)
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    for budget in (8, 10, 12):
        cache, straight = H2OCache(model, budget=budget), H2OCache(model, budget=budget)
        for each in (cache, straight):
            feed(model, each, ids)
        steps = (compiled, cache), (step_function(model), straight)
        assert torch.equal(*(decode(step, each, token, position, 4) for step, each in steps))
        assert cache.layers[0].slots.kept().max() == budget


@pytest.mark.parametrize("allocation", ["heads", uneven])
def test_compiled_steps_keep_to_the_room_of_each_head_where_the_budget_outgrows_it(allocation):
    model, ids = tiny(**TWO_LAYERS), prompt(20, 2)
    shared = allocation(model) if callable(allocation) else allocation
    cache = H2OCache(model, budget=0.5, allocation=shared)
    feed(model, cache, ids)
    room = [layer.slots.capacities.clone() for layer in cache.layers]
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    decode(compiled, cache, ids[:, -1:], torch.full((2, 1), 20, device=DEVICE), 60)
    for layer, capacities in zip(cache.layers, room, strict=True):
        positions = layer.slots.positions
        behind = torch.arange(positions.shape[-1], device=DEVICE) >= capacities[..., None]
        assert (positions[behind] < 0).all(), "tokens lie in another head's slots"
        assert torch.equal(layer.slots.kept(), capacities - 1)
        # the newest is there
        assert (positions == 79).any(-1).all()


def addresses(cache):
    return [
        {name: tensor.data_ptr() for name, tensor in group.items()}
        for layer in cache.layers
        for group in (*(segment.tensors() for segment in layer.segments()), layer.counters(), layer.statistics())
    ]


def feed_on(model, cache, mask):
    mask = torch.cat([mask, mask.new_ones(2, STEPS + 3)], 1)
    return feed(model, cache, prompt(3, 2), mask)


@caches("h2o", "h2o_packed", "expected", "gear", also=(RESERVED,))
def test_the_compiled_step_writes_only_to_tensors_that_stay_where_they_are(entry):
    """CUDA graphs refuse a step that writes to other inputs, and torch then runs it without them."""
    if not entry.compileable:
        pytest.skip("not compileable")
    written, pinned = [], []

    def compiler(graph, inputs):
        facts = TracingContext.get().fw_metadata
        written.append({index for index, facts in enumerate(facts.input_info) if facts.mutates_data})
        pinned.append(set(facts.static_input_indices))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    # each layer has tensors of its own; what they hold is the cache's
    model = tiny(**(TWO_LAYERS if entry.name == "h2o" else ONE_LAYER))
    first = entry.build(model)
    feed(model, first, prompt(20, 2))
    first.reserve(STEPS)
    copies = [first.clone(), first]
    first.batch_repeat_interleave(1)
    compiled = torch.compile(step_function(model), fullgraph=True, backend=backend)
    for cache in copies:
        with torch.no_grad():
            compiled(prompt(1, 2), torch.full((2, 1), 20, device=DEVICE), cache)
    assert len(written) == 1, "another cache of the same shapes is compiled anew"
    assert written[0]
    assert written[0] <= pinned[0]


@caches("h2o", "gear", also=(RESERVED,))
def test_eager_steps_after_compiled_ones_count_right(entry):
    if not entry.compileable:
        pytest.skip("not compileable")
    model = tiny(**ONE_LAYER)
    cache = entry.build(model)
    feed(model, cache, prompt(20, 2))
    cache.reserve(STEPS)
    compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        for place in (20, 21):
            compiled(prompt(1, 2), torch.full((2, 1), place, device=DEVICE), cache)
    feed(model, cache, prompt(1, 2))
    assert cache.get_seq_length() == 23
    assert cache.clone().get_seq_length() == 23
