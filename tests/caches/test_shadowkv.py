"""ShadowKV: what it selects, fetches and rebuilds, what it holds where, and that nothing is lost."""

import gc
import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress import DenseCache, H2OCache, HydragenCache, ShadowKVCache
from kvcompress.hf import cache_argument, cache_name
from kvcompress.kernels.chunk_scores import chunk_scores_reference
from kvcompress.kernels.common import runtime
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.shadowkv import ShadowKV
from kvcompress.storage.low_rank import ShadowSegment
from kvcompress.storage.segment import EMPTY
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny
from tests.contract.test_memory import storages
from tests.kernels.inputs import needs_triton
from tests.peak import peak_bytes

SMALL = {"budget": 8, "chunk": 2, "outlier_chunks": 2, "local_chunks": 2, "fold": 8, "rank": 12}


def small(model, **settings):
    return ShadowKVCache(model, **{**SMALL, **settings})


class Fed:
    """Writes down the keys and values of every forward, and the queries of the last, by layer."""

    def __init__(self, cache):
        self.pairs = [[] for _ in cache.layers]
        self.queries = [None] * len(cache.layers)
        for index, layer in enumerate(cache.layers):
            self._watch(index, layer)

    def _watch(self, index, layer):
        update, read = layer.update, layer._read

        def note(key, value, *args, **kwargs):
            self.pairs[index].append((key.clone(), value.clone()))
            return update(key, value, *args, **kwargs)

        def ask(chunk, segment, again=False):
            self.queries[index] = chunk.query.clone()
            return read(chunk, segment, again)

        layer.update, layer._read = note, ask

    def of(self, index):
        """Keys and values of a layer, [batch, kv_heads, tokens, head_dim] each."""
        return tuple(torch.cat(parts, 2) for parts in zip(*self.pairs[index], strict=True))


def decoded(model, cache, steps=3, batch=2, tokens=60):
    fed = Fed(cache)
    feed(model, cache, prompt(tokens, batch))
    for step in range(steps):
        feed(model, cache, prompt(1, batch, seed=step))
    return fed


# selection


# docs: the chunks that the last query chose
@pytest.mark.parametrize("layout", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_the_selection_is_the_top_of_the_formula_over_all_chunks(layout):
    heads, kv_heads = layout
    model = tiny("llama", num_attention_heads=heads, num_key_value_heads=kv_heads)
    cache = small(model)
    fed = decoded(model, cache)
    for index, layer in enumerate(cache.layers):
        segment = layer.segment
        keys, _ = fed.of(index)
        folded = int(segment.folded[0])
        assert folded > 8
        chunks = keys[:, :, : 2 * folded].unflatten(2, (folded, 2))
        means = chunks.mean(3)
        cosines = torch.cosine_similarity(chunks, means[:, :, :, None], dim=-1).amin(-1)
        outliers = cosines.argsort(-1)[..., :2]
        assert torch.equal(segment.outliers.sort(-1).values, outliers.sort(-1).values)
        is_open = torch.ones_like(cosines, dtype=torch.bool).scatter(2, outliers, False)
        scores = chunk_scores_reference(fed.queries[index], means, is_open, LogitSpec(keys.shape[-1] ** -0.5))
        wanted = scores.topk(4, -1).indices
        assert torch.equal(segment.held.sort(-1).values, wanted.sort(-1).values)


def test_selected_chunks_outliers_and_the_tail_share_no_token_and_are_in_range():
    model = tiny()
    cache = small(model)
    ids, mask = left_padded([prompt(60)[0], prompt(47, seed=2)[0]])
    feed(model, cache, ids, mask)
    for step in range(40):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        feed(model, cache, prompt(1, 2, seed=step), mask)
        for layer in cache.layers:
            positions = layer.segment.positions
            for row, length in enumerate(layer.segment.lengths.tolist()):
                for head in range(2):
                    held = [place for place in positions[row, head].tolist() if place != EMPTY]
                    assert len(held) == len(set(held))
                    assert max(held) == length - 1
                    # selected, outliers, and all that is not folded
                    assert len(held) == 8 + 4 + int(layer.segment.tails()[row])


def test_the_answer_does_not_depend_on_what_was_fetched_before():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    for step in range(4):
        forgetful = cache.clone()
        for layer in forgetful.layers:
            segment = layer.segment
            segment.held.fill_(EMPTY)
            places = slice(None, segment.exact_from)
            segment.keys[:, :, places], segment.values[:, :, places] = torch.nan, torch.nan
            segment.positions[:, :, places] = EMPTY
        token = prompt(1, 2, seed=step)
        torch.testing.assert_close(feed(model, cache, token), feed(model, forgetful, token), rtol=1e-5, atol=1e-5)


# README: values fetched each step | 2410.21465 |
def test_what_is_fetched_again_is_counted_and_what_stays_is_not():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    page = 2 * 16 * 4
    for step in range(4):
        before = cache.memory()
        held = [set(map(tuple, _chunks(layer))) for layer in cache.layers]
        feed(model, cache, prompt(1, 2, seed=step))
        misses = sum(len(set(map(tuple, _chunks(x))) - was) for x, was in zip(cache.layers, held, strict=True))
        after = cache.memory()
        assert after.fetched_bytes - before.fetched_bytes == misses * page
        assert after.fetching_forwards == step + 1
    # the same query again misses nothing
    again = cache.clone()
    feed(model, cache, prompt(1, 2, seed=3))
    assert again.memory().fetched_bytes == after.fetched_bytes
    assert after.fetched_per_forward == after.fetched_bytes / 4


def _chunks(layer):
    held = layer.segment.held
    return [
        (row, head, chunk)
        for row in range(held.shape[0])
        for head in range(held.shape[1])
        for chunk in held[row, head].tolist()
        if chunk != EMPTY
    ]


# README: | `ShadowKVCache` | everything: low-rank keys, values in host memory or a file
def test_values_in_the_buffer_are_those_that_were_fed_bit_for_bit():
    model = tiny()
    cache = small(model)
    fed = decoded(model, cache, steps=30)
    for index, layer in enumerate(cache.layers):
        segment = layer.segment
        keys, values = fed.of(index)
        at = segment.positions.clamp(min=0).long()[..., None].expand(-1, -1, -1, 16)
        occupied = segment.positions != EMPTY
        assert torch.equal(segment.values[occupied], values.gather(2, at)[occupied])
        exact = occupied.clone()
        exact[:, :, : segment.exact_from] = False
        assert torch.equal(segment.keys[exact], keys.gather(2, at)[exact])
        assert not torch.equal(segment.keys[occupied], keys.gather(2, at)[occupied])


def test_more_is_read_as_the_budget_grows_and_the_error_does_not():
    """Of the attention output, at one rank and over several steps; the last budget reads everything."""
    model = tiny("llama", initializer_range=0.1)
    full = DenseCache(model)
    feed(model, full, prompt(200))
    tokens = [prompt(1, seed=step) for step in range(12)]
    expected = torch.cat([feed(model, full, token) for token in tokens], 1)
    errors = []
    for budget in (2, 8, 32, 64, 128, 400):
        cache = small(model, budget=budget, rank=32, dense_below=0)
        feed(model, cache, prompt(200))
        errors.append(float((torch.cat([feed(model, cache, token) for token in tokens], 1) - expected).norm()))
    assert errors[-1] < 1e-3 * errors[0]
    for less, more in itertools.pairwise(errors):
        assert more < 1.1 * less + 1e-3


class Dispatched(TorchDispatchMode):
    """Writes down what is computed; neither views nor memory that is only taken."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if not function.is_view and "empty" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton to name its kernels")
@pytest.mark.parametrize("tokens", [12, 60], ids=["dense", "folded"])
def test_a_step_of_a_layer_is_four_launches_and_few_other_operations_and_asks_the_device_nothing(tokens):
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(tokens, 2))
    feed(model, cache, prompt(1, 2))
    assert (cache.memory().host_bytes > 0) == (tokens == 60)
    seen = [Dispatched() for _ in cache.layers]
    for layer, dispatched in zip(cache.layers, seen, strict=True):
        attend = layer._attend
        layer._attend = lambda chunk, attend=attend, dispatched=dispatched: _within(dispatched, attend, chunk)
    # a mask is looked at once a forward
    with runtime.recording() as launches, torch.no_grad():
        model(prompt(1, 2), **cache_argument(model, cache))
    assert len(launches) <= 4 * len(cache.layers)
    for dispatched in seen:
        assert len(dispatched.names) <= 12
        assert not {"_local_scalar_dense", "nonzero", "equal", "_to_copy"} & set(dispatched.names)


def _within(mode, attend, chunk):
    with mode:
        return attend(chunk)


# docs: Compiled steps of ShadowKV fold nothing into chunks
# docs: `cache.reserve(steps)`, called again after so many, folds or packs what is due
def test_between_compiled_steps_folds_what_is_due_and_graphs_go_on():
    torch._dynamo.reset()
    model, backend = tiny(num_hidden_layers=1), CompileCounterWithBackend("eager")
    name = cache_name(model)

    def step(token, position, cache):
        return model(token, position_ids=position, **{name: cache}).logits

    compiled, logits = torch.compile(step, fullgraph=True, backend=backend), []
    # both rows are folded from the first, and have as many chunks as are selected
    for run in (step, compiled):
        cache, position = small(model), torch.full((2, 1), 60, device=DEVICE)
        feed(model, cache, prompt(60, 2))
        logits.append([])
        before = cache.layers[0].segment.folded.clone()
        # as many as come until a step that is not compiled would fold
        for seed, steps in enumerate((9, 8, 8)):
            cache.reserve(steps)
            places = [layer.segment.keys.data_ptr() for layer in cache.layers]
            for token in prompt(steps, 2, seed=seed).split(1, 1):
                with torch.no_grad():
                    logits[-1].append(run(token, position, cache))
                position = position + 1
            assert places == [layer.segment.keys.data_ptr() for layer in cache.layers]
        assert (cache.layers[0].segment.folded > before).all()
        assert cache.get_seq_length() == 60 + 25
        assert cache.layers[0].segment.lengths.tolist() == [85, 85]
    assert torch.equal(*(torch.cat(each, 1) for each in logits))
    # and another graph where folded chunks took more room
    assert backend.frame_count <= 3


def test_generate_folds_between_its_compiled_steps():
    torch._dynamo.reset()
    model, backend = build("llama", num_hidden_layers=1), CompileCounterWithBackend("eager")
    cache, straight = small(model), small(model)
    for each in (cache, straight):
        each.reserve()
    expected = generate(model, straight, prompt(60, 2), max_new_tokens=30)
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(generate(model, cache, prompt(60, 2), max_new_tokens=30), expected)
    assert 0 < backend.frame_count < 10
    for layer, other in zip(cache.layers, straight.layers, strict=True):
        assert torch.equal(layer.segment.folded, other.segment.folded)
        assert int(layer.segment.tails().max()) <= 2 * 2 + 8 + 1


@needs_triton
def test_what_is_fed_past_the_room_is_nan_and_no_wrong_answer():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    cache.reserve()
    segment = cache.layers[0].segment
    room = segment.keys.shape[2] - segment.tail_from
    segment.marks[1, 0] = segment.marks[1, 1] + room
    query, key = (torch.randn(2, heads, 1, 16, device=DEVICE) for heads in (4, 2))
    out, _ = segment.decode(query, key, key, LogitSpec(0.25), None)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


# what lies where


# docs: evicts nothing: whatever an unforeseen question needs is still there
# docs: `cache.memory()` reports separately the bytes on device, host and disk, and the bytes fetched per step
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rank", [None, 12])
def test_the_bytes_are_the_formula(batch, rank):
    tokens, chunk, budget, outliers, local, heads, dim = 400, 4, 32, 5, 3, 2, 16
    model = tiny()
    cache = ShadowKVCache(model, budget=budget, rank=rank, chunk=chunk, outlier_chunks=outliers, local_chunks=local)
    feed(model, cache, prompt(tokens, batch))
    report = cache.memory()
    folded = tokens // chunk - local
    r = round(160 / 1024 * heads * dim) if rank is None else rank
    # selected, outliers, tail and room for 64 more
    slots = budget + outliers * chunk + tokens - folded * chunk + 64
    layers = len(cache.layers)
    wanted = {
        "coefficients": batch * folded * chunk * r * 4,
        "basis": batch * r * heads * dim * 4,
        "landmarks": batch * heads * folded * dim * 4,
        "is_open": batch * heads * folded,
        "pages": batch * folded * 8,
        "keys": batch * heads * slots * dim * 4,
        "values": batch * heads * slots * dim * 4,
        "positions": batch * heads * slots * 4,
        "held": batch * heads * budget // chunk * 8,
        "outliers": batch * heads * outliers * 8,
        "cosines": batch * heads * outliers * 4,
        "missed": batch * 4,
        "limits": batch * 8,
        "folded": batch * 8,
        "lengths": batch * 8,
        "counters": 2 * 8 + batch * 3 * 8 + 8,
        "page table": 64 * 8,
        "inv_freq": dim // 2 * 4,
        "host values": batch * heads * folded * chunk * dim * 4,
    }
    counters = sum(wanted.pop(name) for name in ("page table", "inv_freq"))
    wanted["counters"] += counters
    assert report.by_component == {name: layers * size for name, size in wanted.items()}
    assert report.total_bytes == sum(storages(cache).values())
    assert report.host_bytes == layers * wanted["host values"] == report.offloaded["host"]
    assert report.device_bytes == report.total_bytes - report.host_bytes
    assert report.disk_bytes == 0
    assert all((kept == tokens).all() for kept in report.tokens_kept)


# docs: The device keeps a seventh of the full cache (with 8 KV heads of 128), outlier chunks, the newest tokens
def test_a_token_costs_a_seventh_on_the_device_at_the_papers_shape():
    """8 KV heads of 128 in 16 bits: 320 bytes of coefficients, 256 of landmarks, 2 of tables; K and V take 4096."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    model = tiny("llama", **shape, dtype=torch.bfloat16)
    sizes = []
    for tokens in (400, 480):
        cache = ShadowKVCache(model, budget=64, outlier_chunks=4)
        feed(model, cache, prompt(tokens))
        report = cache.memory()
        sizes.append((report.device_bytes, report.host_bytes, report.full_bytes))
    device, host, full = (later - sooner for sooner, later in zip(*sizes, strict=True))
    assert (device, host, full) == (80 * (320 + 256 + 1 + 1), 80 * 2048, 80 * 4096)
    assert full / device > 7


def test_after_prefill_no_values_are_alive_but_the_hosts():
    model = tiny()
    ids = prompt(400, 2)
    gc.collect()
    gc.freeze()
    try:
        cache = small(model)
        feed(model, cache, ids)
        gc.collect()
        large = [
            thing
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor and thing.untyped_storage().nbytes() >= 400 * 16 * 4 * 2
        ]
    finally:
        gc.unfreeze()
    slabs = {slab.data_ptr() for layer in cache.layers for slab in layer.segment.host.slabs}
    low_rank = {layer.segment.coefficients.data_ptr() for layer in cache.layers}
    low_rank |= {layer.segment.landmarks.data_ptr() for layer in cache.layers}
    assert {thing.untyped_storage().data_ptr() for thing in large} <= slabs | low_rank
    assert slabs <= {thing.untyped_storage().data_ptr() for thing in large}


# docs: `host="mmap:/folder"` keeps values in files that are deleted with the cache
def test_a_file_holds_what_memory_would_and_is_gone_with_the_cache(tmp_path):
    model = tiny()
    pinned, mapped = small(model), small(model, host=f"mmap:{tmp_path}")
    for ids in (prompt(60, 2), *prompt(30, 2).split(1, 1), prompt(25, 2, seed=9), prompt(1, 2)):
        assert torch.equal(feed(model, pinned, ids), feed(model, mapped, ids))
    host, disk = pinned.memory(), mapped.memory()
    assert (disk.disk_bytes, disk.host_bytes) == (host.host_bytes, 0)
    assert disk.device_bytes == host.device_bytes
    # no name is left, whatever becomes of the process
    assert list(tmp_path.iterdir()) == []
    copy = mapped.clone()
    del mapped
    assert torch.equal(feed(model, pinned, prompt(1, 2)), feed(model, copy, prompt(1, 2)))


# docs: `load(path, model, host=...)` puts the values of a saved cache elsewhere
@pytest.mark.parametrize("as_prefix", [False, True])
def test_a_saved_cache_goes_to_another_host_where_its_folder_is_gone(as_prefix, tmp_path):
    model = tiny()
    (tmp_path / "pages").mkdir()
    cache = small(model, host=f"mmap:{tmp_path / 'pages'}")
    feed(model, cache, prompt(60))
    if as_prefix:
        cache = HydragenCache.from_cache(cache)
    cache.save(tmp_path / "cache")
    tokens = [prompt(1, seed=step) for step in range(3)]
    expected = [feed(model, cache, token) for token in tokens]
    shutil.rmtree(tmp_path / "pages")
    with pytest.raises(ValueError, match=r"existing folder .* pass host to load"):
        type(cache).load(tmp_path / "cache", model)
    (tmp_path / "new").mkdir()
    for host in ("pinned", f"mmap:{tmp_path / 'new'}"):
        loaded = type(cache).load(tmp_path / "cache", model, host=host)
        assert as_prefix or loaded.host == host
        assert loaded.memory().offloaded.keys() == {"host" if host == "pinned" else "disk"}
        for token, logits in zip(tokens, expected, strict=True):
            assert torch.equal(feed(model, loaded, token), logits)


def test_a_host_for_a_cache_that_keeps_nothing_there_is_refused(tmp_path):
    model = tiny()
    cache = H2OCache(model, budget=8)
    feed(model, cache, prompt(20))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="H2OCache that keeps nothing on the host; got host='pinned'"):
        H2OCache.load(tmp_path / "cache", model, host="pinned")


@pytest.mark.parametrize("host", ["pinned", "mmap"])
def test_a_saved_cache_keeps_its_host_and_only_the_pages_in_use(host, tmp_path):
    model = tiny()
    (tmp_path / "pages").mkdir()
    cache = small(model, host="pinned" if host == "pinned" else f"mmap:{tmp_path / 'pages'}")
    feed(model, cache, prompt(60, 3))
    # the pages of a beam that ended are not in the file
    cache.reorder_cache(torch.tensor([2, 0, 2], device=DEVICE))
    held = sum(cache.memory().offloaded.values())
    cache.save(tmp_path / "cache")
    loaded = ShadowKVCache.load(tmp_path / "cache", model)
    assert (loaded.host, loaded.budget, loaded.settings) == (cache.host, cache.budget, cache.settings)
    assert sum(loaded.memory().offloaded.values()) * 3 == held * 2
    for step in range(12):
        token = prompt(1, 3, seed=step)
        assert torch.equal(feed(model, cache, token), feed(model, loaded, token))


def test_saving_copies_no_page_that_lies_with_others_in_use(tmp_path):
    """As much as a cache keeps off the device would have lain in memory once more."""
    model = tiny()
    cache = small(model)
    for ids in (prompt(400, 2), prompt(300, 2, seed=3)):
        feed(model, cache, ids)
    assert len(cache.layers[0].segment.host.slabs) > 1
    addresses = {slab.data_ptr() for layer in cache.layers for slab in layer.segment.host.slabs}
    for layer in cache.layers:
        tensors, _ = layer.dump()
        parts = [tensor for name, tensor in tensors.items() if name.startswith("host_values")]
        assert sum(part.nbytes for part in parts) == 2 * int(layer.segment.folded[0]) * 2 * 2 * 16 * 4
        assert {part.data_ptr() for part in parts} <= addresses
    cache.save(tmp_path / "cache")
    loaded = ShadowKVCache.load(tmp_path / "cache", model)
    for ids in (prompt(100, 2, seed=5), prompt(1, 2)):
        assert torch.equal(feed(model, cache, ids), feed(model, loaded, ids))


@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's allocator is asked what it gave, on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_prefill_takes_at_most_one_and_a_half_times_the_keys_and_values_beside_them(dtype, padded):
    """With what stays, the values off the device among it; it took 3.3 to 3.5 times."""
    batch, tokens = 2, 4096
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=4, head_dim=32, num_hidden_layers=1, dtype=dtype)
    layer = ShadowKVCache(model, budget=256).layers[0]
    query, key, value = (torch.randn(batch, tokens, 4, 32).to(dtype).transpose(1, 2) for _ in range(3))
    visible = torch.ones(batch, tokens, dtype=torch.bool)
    visible[0, :37] = not padded

    def run():
        layer.update(key, value)
        return layer.attend(query, visible, LogitSpec(0.1), sinks=None, position_ids=None)

    peak, out = peak_bytes(run)
    assert int(layer.segment.folded[1]) == 508
    # the output is the model's
    assert peak - out.nbytes <= 1.5 * (key.nbytes + value.nbytes)


# rows share pages


# docs: Beams and clones share the host's pages
def test_beams_and_clones_copy_no_page():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    before = cache.memory().host_bytes
    addresses = [slab.data_ptr() for layer in cache.layers for slab in layer.segment.host.slabs]
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0, 0, 1, 5, 3, 3], device=DEVICE))
    copy = cache.clone()
    for each in (cache, copy):
        assert each.memory().host_bytes == before
        assert [slab.data_ptr() for layer in each.layers for slab in layer.segment.host.slabs] == addresses
    # what they fold from now on is their own
    for step in range(20):
        feed(model, cache, prompt(1, 6, seed=step))
    assert copy.memory().host_bytes == before
    straight = small(model)
    feed(model, straight, prompt(60, 2))
    straight.batch_repeat_interleave(3)
    straight.reorder_cache(torch.tensor([0, 0, 1, 5, 3, 3], device=DEVICE))
    for step in range(20):
        token = prompt(1, 6, seed=100 + step)
        assert torch.equal(feed(model, copy, token), feed(model, straight, token))


@pytest.mark.parametrize("host", ["pinned", "mmap"])
def test_rows_that_leave_give_their_room_back(host, tmp_path):
    """On the device and off it: what is left is what one that was fed the short row alone holds, or little more."""
    model = tiny()
    ids, mask = left_padded([prompt(400)[0], prompt(60, seed=2)[0]])
    where = "pinned" if host == "pinned" else f"mmap:{tmp_path}"
    cache, alone = small(model, host=where), small(model)
    feed(model, cache, ids, mask)
    feed(model, alone, ids[1:, 340:])
    cache.batch_select_indices(torch.tensor([1], device=DEVICE))
    mask = mask[1:]
    for step in range(12):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        token = prompt(1, seed=step)
        left = feed(model, cache, token, mask)
        torch.testing.assert_close(left, feed(model, alone, token), rtol=1e-5, atol=1e-5)
        report, expected = cache.memory(), alone.memory()
        padding = report.by_component["padding"]
        assert report.host_bytes + report.disk_bytes == expected.host_bytes
        assert report.device_bytes - padding <= expected.device_bytes


def test_a_row_that_stays_has_chunks_for_every_place_that_stays():
    """Where little would be given back, the places of selected chunks stay, though fewer chunks are left."""
    model = tiny()
    ids, mask = left_padded([prompt(39)[0], prompt(33, seed=2)[0]])
    cache, alone = (small(model, budget=200, dense_below=0, fold=12, local_chunks=4) for _ in range(2))
    for start, stop in ((0, 15), *((place, place + 1) for place in range(15, 39))):
        feed(model, cache, ids[:, start:stop], mask[:, :stop])
        feed(model, alone, ids[1:, max(6, start) : stop])
    places = cache.layers[0].segment.held.shape[2]
    cache.batch_select_indices(torch.tensor([1], device=DEVICE))
    segment = cache.layers[0].segment
    assert int(segment.folded.max()) < segment.held.shape[2] == places
    token = prompt(1, seed=3)
    left = feed(model, cache, token, torch.cat([mask[1:], mask[1:, -1:]], 1))
    torch.testing.assert_close(left, feed(model, alone, token), rtol=1e-5, atol=1e-5)


# docs: Pages of dropped beams stay on the host until rows leave the cache, or it is reset, or saved and loaded
@pytest.mark.parametrize("way", ["rows leave", "saved and loaded", "reset"])
def test_pages_of_beams_that_died_stay_for_a_while(way, tmp_path):
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 4))
    before = cache.memory().host_bytes
    cache.reorder_cache(torch.zeros(4, dtype=torch.long, device=DEVICE))
    assert cache.memory().host_bytes == before
    if way == "rows leave":
        cache.batch_select_indices(torch.tensor([0, 1], device=DEVICE))
    elif way == "saved and loaded":
        cache.save(tmp_path / "cache")
        cache = ShadowKVCache.load(tmp_path / "cache", model)
    else:
        cache.reset()
    assert cache.memory().host_bytes == (0 if way == "reset" else before // 4)


# docs: For ShadowKV it is a share of the first forward
def test_a_fraction_is_of_the_first_forward():
    model = tiny()
    cache = small(model, budget=0.5)
    feed(model, cache, prompt(60))
    limits = [layer.segment.limits.tolist() for layer in cache.layers]
    feed(model, cache, prompt(60, seed=2))
    assert [layer.segment.limits.tolist() for layer in cache.layers] == limits
    assert limits[0] == [30 // cache.settings.chunk]


def test_rows_that_leave_keep_what_clones_share():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 3))
    copy = cache.clone()
    copy.batch_select_indices(torch.tensor([1], device=DEVICE))
    assert copy.memory().host_bytes * 3 == cache.memory().host_bytes
    token = prompt(1, 3, seed=7)
    torch.testing.assert_close(feed(model, copy, token[1:2])[0], feed(model, cache, token)[1], rtol=1e-5, atol=1e-5)


# the tail


# README: KIVI and ShadowKV take back drafts of any length
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("drafts", [3, 33, pytest.param(300, marks=pytest.mark.slow)])
def test_drafts_of_any_length_are_taken_back(family, drafts):
    """Also those that come with the prompt, as generate feeds the first of them; and by sliding layers."""
    model = tiny(family, vocab_size=14)
    ids = prompt(60) % 12 + 2
    # no draft reaches further than the answer may
    how = {"prompt_lookup_num_tokens": drafts, "max_matching_ngram_size": 1, "max_new_tokens": drafts + 10}
    # all chunks are read, however many queries ask
    cache, plain = (small(model, budget=1000, rank=32, dense_below=0) for _ in range(2))
    # what comes before makes drafts that are long
    ids = torch.cat([ids] * 8, 1)
    fed = []
    update = cache.layers[0].update
    cache.layers[0].update = lambda key, *rest, **how: (fed.append(key.shape[2]), update(key, *rest, **how))[1]
    out = generate(model, cache, ids, **how)
    assert torch.equal(out, generate(model, plain, ids, max_new_tokens=drafts + 10))
    assert fed[0] == ids.shape[1] + drafts
    assert max(fed[1:]) > 1


def test_what_is_fed_while_the_past_is_recorded_stays_until_the_next_forward():
    model = tiny()
    # all chunks are read, however many queries ask
    cache, other = (small(model, budget=400, dense_below=0) for _ in range(2))
    cache.activate_past_recording()
    for each in (cache, other):
        feed(model, each, prompt(60, 2))
    feed(model, cache, prompt(300, 2, seed=5))
    cache.crop(-299)
    assert cache.get_seq_length() == 61
    feed(model, other, prompt(300, 2, seed=5)[:, :1])
    for step in range(4):
        token = prompt(1, 2, seed=step)
        torch.testing.assert_close(feed(model, cache, token), feed(model, other, token), rtol=1e-4, atol=1e-4)
    assert int(cache.layers[0].segment.tails().max()) <= 2 * 2 + 8 + 1


def test_generation_goes_on_past_any_size_of_the_tail():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(40, 2))
    for step in range(300):
        assert torch.isfinite(feed(model, cache, prompt(1, 2, seed=step))).all()
        for layer in cache.layers:
            assert int(layer.segment.tails().max()) <= 2 * 2 + 8 + 1
            assert layer.segment.lengths.tolist() == [41 + step] * 2
    # slabs grow by a share of what there is: few of them
    assert max(len(layer.segment.host.slabs) for layer in cache.layers) < 20
    assert cache.get_seq_length() == 340


def test_a_sequence_that_would_be_read_whole_stays_dense():
    model = tiny()
    # 4 selected, 2 outliers and 2 local chunks of 2 tokens
    cache, full = small(model), DenseCache(model)
    for ids in (prompt(10, 2), *prompt(6, 2, seed=3).split(1, 1)):
        torch.testing.assert_close(feed(model, cache, ids), feed(model, full, ids), rtol=1e-5, atol=1e-5)
    assert cache.memory().host_bytes == 0
    feed(model, cache, prompt(1, 2))
    assert cache.memory().host_bytes == 0
    feed(model, cache, prompt(1, 2))
    assert cache.memory().host_bytes > 0


# docs: `crop` takes back only tokens that are not folded into chunks yet
def test_crop_refuses_what_is_folded_and_changes_nothing():
    model = tiny()
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    other = cache.clone()
    with pytest.raises(ValueError, match="can take back only tokens that are not folded, here 4, got 5.*DenseCache"):
        cache.crop(-5)
    assert torch.equal(feed(model, cache, prompt(1, 2)), feed(model, other, prompt(1, 2)))
    cache.crop(-5 + 0)
    assert cache.get_seq_length() == 56


def test_nothing_but_padding_is_answered_with_nothing():
    model = tiny()
    cache, full = small(model), DenseCache(model)
    mask = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    assert torch.isfinite(feed(model, cache, prompt(1, 2), mask)).all()
    feed(model, full, prompt(1, 2), mask)
    mask = torch.cat([mask, torch.ones_like(mask)], 1)
    torch.testing.assert_close(feed(model, cache, prompt(1, 2), mask), feed(model, full, prompt(1, 2), mask))


def test_a_fraction_is_of_each_rows_own_tokens():
    model = tiny()
    ids, mask = left_padded([prompt(80)[0], prompt(40, seed=2)[0]])
    cache = small(model, budget=0.1, outlier_chunks=1)
    feed(model, cache, ids, mask)
    feed(model, cache, prompt(1, 2), torch.cat([mask, mask[:, -1:]], 1))
    for layer in cache.layers:
        assert layer.segment.limits.tolist() == [4, 2]
        assert (layer.segment.held != EMPTY).sum(-1).tolist() == [[4, 4], [2, 2]]


def test_tokens_that_become_padding_after_they_were_folded_are_not_read():
    """Two rows; the first one's last ten tokens turn out to be padding of a finished answer."""
    model = tiny()
    cache = small(model, budget=200, dense_below=0)
    mask = torch.ones(2, 40, dtype=torch.long, device=DEVICE)
    feed(model, cache, prompt(40, 2), mask)
    mask[0, 30:] = 0
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    token = prompt(1, 2, seed=7)
    answer = feed(model, cache, token, mask)
    assert cache.memory().tokens_kept[0].tolist() == [[31, 31], [41, 41]]
    assert cache.layers[0].segment.hidden is not None
    seen = torch.zeros(40, dtype=torch.bool)
    segment = cache.layers[0].segment
    seen[segment.positions[0, 0][segment.positions[0, 0] != EMPTY].long()] = True
    # 36 were folded, of which six are hidden; the tail closed up
    assert seen[:30].all()
    assert not seen[30:36].any()
    alone = small(model, budget=200, dense_below=0, rank=32)
    whole = small(model, budget=200, dense_below=0, rank=32)
    feed(model, alone, prompt(40, 2)[:1, :30])
    feed(model, whole, prompt(40, 2))
    torch.testing.assert_close(
        feed(model, whole, token, mask)[0], feed(model, alone, token[:1])[0], rtol=1e-3, atol=1e-3
    )
    assert torch.isfinite(answer).all()


# the space of the keys


def spaces(cache):
    return [layer.segment.basis.clone() for layer in cache.layers]


# README: one factorisation per prompt
def test_new_keys_go_into_the_old_space_while_it_holds_them_and_a_new_one_when_not():
    model = tiny()
    lenient, strict = small(model, drift=1e6), small(model, drift=1.0)
    for cache in (lenient, strict):
        feed(model, cache, prompt(60, 2))
        before = spaces(cache)
        for chunk in prompt(120, 2, seed=5).split(20, 1):
            feed(model, cache, chunk)
        changed = [not torch.equal(was, now) for was, now in zip(before, spaces(cache), strict=True)]
        assert changed == [cache is strict] * 3


def test_a_space_that_is_fitted_anew_serves_the_old_keys_too():
    """The error over all keys is near that of the best space for them, though the old ones were only kept in part."""
    model = tiny()
    cache = small(model, drift=1.0, rank=16)
    fed = Fed(cache)
    for chunk in prompt(200, 1).split(50, 1):
        feed(model, cache, chunk)
    for index, layer in enumerate(cache.layers):
        segment = layer.segment
        tokens = int(segment.folded[0]) * 2
        keys = layer.rope.unrotate(fed.of(index)[0][:, :, :tokens], torch.arange(tokens, device=DEVICE))
        flat = keys.transpose(1, 2).flatten(2)[0]
        kept = (segment.coefficients[0, :tokens] @ segment.basis[0] - flat).norm()
        best = torch.linalg.svdvals(flat)[16:].norm()
        assert best <= kept * 1.0001
        assert kept < 1.5 * best


def test_a_new_space_holds_old_and_new_keys_though_they_have_nothing_in_common():
    torch.manual_seed(0)
    space = torch.linalg.qr(torch.randn(32, 32)).Q
    settings = ShadowKV(rank=12, chunk=2, outlier_chunks=0, local_chunks=1)
    old, new = (
        (torch.randn(1, 60, 6) @ part.T).unflatten(2, (2, 16)).transpose(1, 2).to(DEVICE)
        for part in (space[:, :6], space[:, 6:12])
    )
    segment = ShadowSegment(settings, None, "pinned", old, old, torch.tensor([4]))
    for keys in (old, new):
        segment.append(keys, keys, None, None)
        segment.fold(segment.tails() // 2)
    flat = torch.cat([old, new], 2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(segment.coefficients[:, :120] @ segment.basis, flat, rtol=1e-4, atol=1e-4)


def test_the_space_after_a_prompt_in_pieces_is_nearly_the_best_one():
    """The first piece's keys lie in another space than most; the best any sequence of fits does here is 1.077."""
    torch.manual_seed(0)
    width, tokens, rank = 64, 1024, 10
    first, last = torch.randn(2, width, width) * 0.95 ** torch.arange(width)[:, None]
    share = torch.linspace(0, 4, tokens)[:, None].clamp(max=1)
    noise = torch.randn(2, tokens, width)
    flat = noise[0] @ first * (1 - share) + noise[1] @ last * share
    keys = flat.unflatten(1, (2, 32)).transpose(0, 1)[None].to(DEVICE)
    best = torch.linalg.svdvals(flat)[rank:].norm()

    def error(**drift):
        settings = ShadowKV(rank=rank, chunk=2, outlier_chunks=0, local_chunks=1, **drift)
        segment = ShadowSegment(settings, None, "pinned", keys, keys, torch.tensor([4]))
        for piece in keys.split(64, 2):
            segment.append(piece, piece, None, None)
            segment.fold(segment.tails() // 2)
        kept = segment.coefficients[0, :tokens] @ segment.basis[0]
        return float((kept.cpu() - flat).norm() / best)

    assert 1.0 <= error() < 1.08
    assert error(drift=1.5) > 1.2


def test_keys_that_are_long_together_have_coefficients_in_float16():
    """Of 3000 in each of 1024 numbers: 96000 of one direction, where float16 ends at 65504."""
    torch.manual_seed(0)
    keys = torch.randn(1, 8, 64, 128) * 3000
    keys[:, :, ::2] = 3000 + keys[:, :, ::2] / 100
    keys = keys.half().to(DEVICE)
    segment = ShadowSegment(
        ShadowKV(rank=64, chunk=2, outlier_chunks=0, local_chunks=1), None, "pinned", keys, keys, torch.tensor([4])
    )
    segment.append(keys, keys, None, None)
    segment.fold(segment.tails() // 2)
    rebuilt = (segment.coefficients.float() @ segment.basis.float())[:, :64]
    flat = keys.transpose(1, 2).flatten(2).float()
    assert flat.norm(dim=-1).max() > 65504
    assert (rebuilt - flat).norm() < 3e-3 * flat.norm()


def test_float16_coefficients_for_rows_of_length_one_are_read_as_they_were_meant():
    """Files of earlier versions have them."""
    model = tiny(dtype=torch.float16)
    cache = small(model)
    feed(model, cache, prompt(60, 2))
    layer = cache.layers[0]
    tensors, facts = layer.dump()
    # 32 numbers a token: rows of length 8
    earlier = tensors | {"basis": tensors["basis"] / 8, "coefficients": tensors["coefficients"] * 8}
    assert float(earlier["basis"].float().norm(dim=-1).max()) < 1.1
    other = small(model).layers[0]
    other.restore(earlier, facts)
    assert torch.equal(other.segment.basis, layer.segment.basis)
    torch.testing.assert_close(other.segment.coefficients, layer.segment.coefficients)


# refusals


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"budget": 7}, ValueError, "budget must be at least one chunk = 8 tokens, got 7"),
        ({"budget": 1.5}, ValueError, r"fraction of the first forward in \(0, 1\] \(float\), got 1.5"),
        ({"budget": "all"}, TypeError, "count of tokens .* or a fraction .*'all'"),
        ({"host": "gpu"}, ValueError, "host must be 'pinned', or 'mmap:' and an existing folder .*'gpu'"),
        ({"host": "mmap:/no/such/folder"}, ValueError, "existing folder"),
        ({"rank": 100}, ValueError, r"rank must be at most kv_heads \* head_dim = 32, got 100"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
    ],
)
def test_impossible_settings(settings, kind, message):
    with pytest.raises(kind, match=message):
        feed(tiny(), ShadowKVCache(tiny(), **settings), prompt(3))


# docs: ShadowKV refuses RoPE whose frequencies change with the length (dynamic, longrope)
def test_a_rope_that_cannot_be_taken_back_is_refused():
    model = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="RoPE of type 'dynamic'"):
        ShadowKVCache(model)


def test_a_model_without_rotation_needs_none():
    model = tiny("opt")
    cache = small(model)
    generate(model, cache, prompt(60, 2))
    assert all(layer.rope is None for layer in cache.layers)
    assert cache.memory().host_bytes > 0


def test_a_saved_cache_of_one_head_takes_no_less_than_the_original(tmp_path):
    model = tiny(num_key_value_heads=1)
    cache = ShadowKVCache(model, budget=4, rank=8, chunk=2, outlier_chunks=1, local_chunks=1, fold=4)
    feed(model, cache, prompt(40))
    assert int(cache.layers[0].segment.folded) > 0
    cache.save(tmp_path / "cache")
    loaded = ShadowKVCache.load(tmp_path / "cache", model)
    assert loaded.memory().device_bytes == cache.memory().device_bytes
