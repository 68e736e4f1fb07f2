"""The laws of H2O as a cache, on tiny random models: what it keeps, what it scores, what it reports."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from kvcompress import DenseCache, EvictingCache, H2OCache, SnapKVCache
from kvcompress.hf import cache_argument
from kvcompress.policies.h2o import H2O
from tests.contract.models import WINDOW, build, left_padded, places, prompt, tiny
from tests.replay import Replay, record


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    """One forward of new tokens; mask [batch, seen + new]."""
    if mask is None:
        return model(ids, **cache_argument(model, cache)).logits
    return model(
        ids, attention_mask=mask, position_ids=places(mask)[:, -ids.shape[1] :], **cache_argument(model, cache)
    ).logits


def feed_all(model, cache, ids, pieces, mask=None):
    """The ids in pieces; their logits, [batch, tokens, vocabulary]."""
    logits, start = [], 0
    for size in pieces:
        stop = start + size
        logits.append(feed(model, cache, ids[:, start:stop], None if mask is None else mask[:, :stop]))
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def held(layer):
    """Positions held, sorted, [batch, kv_heads, slots], and the scores in that order."""
    positions, order = layer.slots.positions.sort(-1)
    return positions, layer.slots.scores.gather(-1, order)


def sets(positions):
    """[batch][kv_head] -> sorted list of positions."""
    return [[sorted(p for p in head.tolist() if p >= 0) for head in row] for row in positions]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "opt"])
def test_with_room_for_all_it_is_the_full_cache(family):
    model, ids = tiny(family), prompt(30, batch=2)
    pieces = [17, *[1] * 6, 5, 1, 1]
    full = DynamicCache(config=model.config)
    expected = feed_all(model, full, ids, pieces)
    for cache in (H2OCache(model, budget=64), H2OCache(model, budget=64, sinks=4), DenseCache(model)):
        torch.testing.assert_close(feed_all(model, cache, ids, pieces), expected, atol=2e-5, rtol=1e-4)


def test_the_kept_count_is_the_smaller_of_tokens_and_budget_after_every_step():
    model, ids = tiny("llama"), prompt(26, batch=2)
    cache = H2OCache(model, budget=12)
    seen = 0
    for size in [7, *[1] * 8, 6, *[1] * 5]:
        feed(model, cache, ids[:, seen : seen + size])
        seen += size
        for layer in cache.layers:
            assert layer.tokens_kept().tolist() == [[min(seen, 12)] * 2] * 2


def test_the_bytes_are_those_of_the_slots():
    model, ids = tiny("llama"), prompt(40, batch=3)
    cache = H2OCache(model, budget=12)
    feed(model, cache, ids)
    batch, kv_heads, head_dim, slots, layers = 3, 2, 16, 12 + 1, 3
    report = cache.memory()
    assert report.by_component["keys"] == layers * batch * kv_heads * slots * head_dim * 4
    assert report.by_component["values"] == layers * batch * kv_heads * slots * head_dim * 4
    assert report.by_component["positions"] == layers * batch * kv_heads * slots * 4
    assert report.by_component["scores"] == layers * batch * kv_heads * slots * 4
    assert report.full_bytes == layers * 2 * batch * kv_heads * 40 * head_dim * 4
    before = report.total_bytes
    for _ in range(5):
        feed(model, cache, ids[:, :1])
    assert cache.memory().total_bytes == before


@pytest.mark.parametrize(("recent", "sinks"), [(0.5, 0), (3, 0), (5, 3), (1.0, 2)])
def test_the_newest_tokens_and_the_sinks_are_always_kept(recent, sinks):
    model, ids = tiny("llama"), prompt(30, batch=2)
    cache = H2OCache(model, budget=10, recent=recent, sinks=sinks)
    window = recent if isinstance(recent, int) else int(10 * recent)
    window = min(window, 10 - sinks)
    seen = 0
    for size in [14, 1, 1, 1, 4, *[1] * 9]:
        feed(model, cache, ids[:, seen : seen + size])
        seen += size
        for layer in cache.layers:
            for row in sets(layer.slots.positions):
                for kept in row:
                    assert set(range(seen - window, seen)) <= set(kept)
                    assert set(range(sinks)) <= set(kept)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_scores_are_the_column_sums_of_the_eager_probabilities(family):
    model, ids = tiny(family), prompt(21, batch=2)
    eager = build(family, attention="eager")
    with torch.no_grad():
        probabilities = eager(ids, output_attentions=True).attentions
    cache = H2OCache(model, budget=64)
    feed(model, cache, ids)
    for layer, eager_layer in zip(cache.layers, probabilities, strict=True):
        positions, scores = held(layer)
        kv_heads = positions.shape[1]
        expected = eager_layer.double().sum(2).unflatten(1, (kv_heads, -1)).sum(2)
        expected = expected.gather(2, positions.clamp(min=0).long()).masked_fill(positions < 0, 0.0)
        torch.testing.assert_close(scores.masked_fill(positions < 0, 0.0), expected.float(), atol=1e-5, rtol=1e-5)


def test_every_query_gives_out_one_unit_of_attention_a_head():
    model, ids = tiny("llama"), prompt(24, batch=2)
    group = 2
    cache = H2OCache(model, budget=64)
    seen = 0
    for size in [9, 1, 1, 6, 1, 1, 5]:
        before = [0.0 if layer.slots is None else layer.slots.scores.double().sum(-1) for layer in cache.layers]
        feed(model, cache, ids[:, seen : seen + size])
        seen += size
        for layer, held_before in zip(cache.layers, before, strict=True):
            given = layer.slots.scores.double().sum(-1) - held_before
            torch.testing.assert_close(given, torch.full_like(given, size * group), atol=1e-4, rtol=0)


# README: | `H2OCache` | heavy hitters + recent |
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    ("family", "budget", "settings"),
    [
        ("llama", 12, {}),
        ("llama", 11, {"recent": 2, "sinks": 2}),
        ("gpt_neox", 9, {"recent": 1}),
        ("mistral", 8, {}),
        ("mistral", 30, {"recent": 4, "sinks": 3}),
    ],
)
def test_what_is_kept_is_what_a_float64_replay_keeps(family, budget, settings, padded):
    model = tiny(family)
    lengths = (19, 30, 26) if padded else (30, 30, 30)
    ids, mask = left_padded([prompt(length, seed=length)[0] for length in lengths])
    more = prompt(34, batch=3, seed=5)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    cache = H2OCache(model, budget=budget, **settings)
    steps = record(cache)
    feed_all(model, cache, ids, [30, *[1] * 20, 6, *[1] * 8], mask if padded else None)

    recent = settings.get("recent", 0.5)
    for layer, seen in zip(cache.layers, steps, strict=True):
        window = layer.window
        limit = budget if window is None else min(budget, window)
        sinks = settings.get("sinks", 0)
        protected = min(recent if isinstance(recent, int) else int(limit * recent), limit - sinks)
        batch, kv_heads = seen[0].positions.shape[:2]
        for row in range(batch):
            for head in range(kv_heads):
                replay = Replay(limit, protected, sinks, window, scale=seen[0].query.shape[-1] ** -0.5)
                for number, step in enumerate(seen):
                    group = step.query.shape[1] // kv_heads
                    real = slice(None) if step.visible is None else step.visible[row]
                    query = step.query[row, head * group : (head + 1) * group][:, real]
                    out = replay.feed(query, step.key[row, head][real], step.value[row, head][real])
                    actual = step.out[row, head * group : (head + 1) * group][:, real].double()
                    torch.testing.assert_close(actual, out, atol=1e-4, rtol=1e-4)
                    positions = step.positions[row, head].tolist()
                    kept = [token.position for token in replay.held]
                    assert sorted(p for p in positions if p >= 0) == kept, f"row {row} head {head} forward {number}"
                    scores = torch.tensor([float(step.scores[row, head, positions.index(p)]) for p in kept])
                    expected = torch.tensor([token.score for token in replay.held])
                    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [10, 0.5])
def test_a_row_of_a_padded_batch_is_treated_as_if_alone(budget):
    model = tiny("llama")
    rows = [prompt(length, seed=length)[0] for length in (8, 21, 15)]
    ids, mask = left_padded(rows)
    more = prompt(12, batch=3, seed=9)
    together = H2OCache(model, budget=budget)
    batch_ids = torch.cat([ids, more], 1)
    batch_mask = torch.cat([mask, torch.ones_like(more)], 1)
    pieces = [*[1] * 5, 4, 1, 1, 1]
    logits = feed_all(model, together, batch_ids, [21, *pieces], batch_mask)
    for index, row in enumerate(rows):
        alone = H2OCache(model, budget=budget)
        own = feed_all(model, alone, torch.cat([row[None], more[index : index + 1]], 1), [len(row), *pieces])
        torch.testing.assert_close(logits[index, 21 - len(row) :], own[0], atol=2e-5, rtol=1e-4)
        for layer, single in zip(together.layers, alone.layers, strict=True):
            assert sets(layer.slots.positions)[index] == sets(single.slots.positions)[0]


def test_reordering_moves_scores_and_positions_with_keys_and_values():
    model, ids = tiny("llama"), prompt(20, batch=3)
    cache = H2OCache(model, budget=8)
    feed(model, cache, ids)
    beams = torch.tensor([2, 0, 0])
    before = [{name: tensor.clone() for name, tensor in layer.slots.tensors().items()} for layer in cache.layers]
    cache.reorder_cache(beams)
    for layer, was in zip(cache.layers, before, strict=True):
        assert set(was) == {"keys", "values", "positions", "scores", "spare"}
        for name, tensor in layer.slots.tensors().items():
            torch.testing.assert_close(tensor, was[name][beams], rtol=0, atol=0)
    token = prompt(1, batch=3, seed=4)
    reordered = H2OCache(model, budget=8)
    feed(model, reordered, ids[beams])
    torch.testing.assert_close(feed(model, cache, token), feed(model, reordered, token), atol=1e-5, rtol=1e-4)


def test_selecting_rows_keeps_theirs():
    model, ids = tiny("llama"), prompt(20, batch=3)
    cache, alone = H2OCache(model, budget=8), H2OCache(model, budget=8)
    feed(model, cache, ids)
    feed(model, alone, ids[1:2])
    cache.batch_select_indices(torch.tensor([1]))
    token = prompt(1, seed=4)
    torch.testing.assert_close(feed(model, cache, token), feed(model, alone, token), atol=1e-5, rtol=1e-4)
    assert [sets(layer.slots.positions) for layer in cache.layers] == [
        sets(layer.slots.positions) for layer in alone.layers
    ]


# README: layer and KV head; tokens keep their true positions
def test_the_length_is_that_of_the_tokens_seen_and_positions_keep_growing():
    model, ids = tiny("llama"), prompt(20, batch=2)
    cache = H2OCache(model, budget=6)
    positions = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"].flatten().tolist()), with_kwargs=True
    )
    try:
        model.generate(ids, **cache_argument(model, cache), max_new_tokens=9, do_sample=False, disable_compile=True)
    finally:
        handle.remove()
    # the last token generated is not fed
    assert cache.get_seq_length() == 20 + 8
    assert all(layer.get_seq_length() == 28 for layer in cache.layers)
    assert positions[0][:20] == list(range(20))
    assert [step[0] for step in positions[1:]] == list(range(20, 28))
    assert cache.layers[0].tokens_kept().unique().tolist() == [6]


def test_scores_stay_float32_in_a_bfloat16_model():
    model = build("llama", dtype=torch.bfloat16)
    ids = prompt(40)
    cache = H2OCache(model, budget=16)
    feed_all(model, cache, ids, [30, *[1] * 10])
    for layer in cache.layers:
        assert layer.slots.keys.dtype == torch.bfloat16
        assert layer.slots.scores.dtype == torch.float32


def test_a_large_score_still_grows_by_small_steps():
    # in half precision a sum of 2048 stops growing by 0.6
    model, ids = tiny("llama"), prompt(12)
    cache = H2OCache(model, budget=16)
    feed(model, cache, ids)
    for layer in cache.layers:
        layer.slots.scores.add_(4096.0)
    before = [layer.slots.scores[..., :12].double().sum() for layer in cache.layers]
    for _ in range(3):
        feed(model, cache, ids[:, :1])
    for layer, was in zip(cache.layers, before, strict=True):
        gained = layer.slots.scores[..., :12].double().sum() - was
        assert 0.5 < gained < 12.0


def test_a_fraction_is_taken_of_each_sequences_real_tokens():
    model = tiny("llama")
    ids, mask = left_padded([prompt(10, seed=1)[0], prompt(30, seed=2)[0]])
    cache = H2OCache(model, budget=0.2)
    feed(model, cache, ids, mask)
    for layer in cache.layers:
        assert layer.tokens_kept().tolist() == [[2, 2], [6, 6]]


# README: A budget given as a fraction is a share of the tokens seen so far
# docs: A fraction is a share of the tokens seen so far, so that chunks and long answers keep their share
def test_a_fraction_follows_the_tokens_seen_in_chunks_and_in_decoding():
    model = tiny("llama")
    ids = prompt(230)
    whole, cache = H2OCache(model, budget=0.2), H2OCache(model, budget=0.2)
    feed(model, whole, ids[:, :200])
    early = []
    for part in ids[:, :200].split(50, 1):
        feed(model, cache, part)
        held = cache.layers[0].slots.positions[0, 0].tolist()
        early.append({place for place in held if 0 <= place < 50})
    # what is gone stays gone
    assert all(later <= sooner for sooner, later in itertools.pairwise(early))
    assert all(kept.tolist() == [[40, 40]] for each in (whole, cache) for kept in each.memory().tokens_kept)
    for token in ids[:, 200:].split(1, 1):
        feed(model, cache, token)
    assert all(kept.tolist() == [[46, 46]] for kept in cache.memory().tokens_kept)


# docs: a fraction that is too small is raised, with a warning
@pytest.mark.parametrize(
    "make", [SnapKVCache, H2OCache, lambda model, budget: H2OCache(model, budget=budget, recent=32)]
)
def test_a_fraction_that_leaves_nothing_to_choose_is_raised_and_told(make):
    model = tiny("llama")
    cache = make(model, budget=0.02 if make is H2OCache else 0.2)
    least = cache.policy.least_budget()
    with pytest.warns(UserWarning, match=f"too few to leave .* a choice: {least} are kept as long as it is less"):
        feed(model, cache, prompt(60))
    assert all(kept.tolist() == [[least, least]] for kept in cache.memory().tokens_kept)
    assert all((layer.recents < layer.limits).all() for layer in cache.layers)


# README: the slots of each layer and KV head grow to the budget and no further
@pytest.mark.parametrize("budget", [100_000, 512, 1.0])
def test_room_is_taken_as_it_is_needed(budget):
    """The first example of README once took 1336 % of the full cache."""
    model = tiny("llama")
    cache = H2OCache(model, budget=budget)
    feed(model, cache, prompt(60))
    assert cache.layers[0].slots.slots == 61
    expected = DenseCache(model)
    feed(model, expected, prompt(60))
    for step in range(40):
        token = prompt(1, seed=step)
        torch.testing.assert_close(feed(model, cache, token), feed(model, expected, token), rtol=1e-4, atol=1e-4)
        assert cache.layers[0].slots.slots <= 1.2 * (61 + step) + 8
    cache.reset()
    if isinstance(budget, int):
        cache.reserve()
        feed(model, cache, prompt(60))
        assert cache.layers[0].slots.slots == budget + 1


# README: A compiled decode step cannot grow its cache
# docs: if you compile by hand, call `cache.reserve()` first
def test_a_compiled_step_without_room_says_what_to_call():
    model = tiny("llama")
    cache = H2OCache(model, budget=100)
    feed(model, cache, prompt(20))
    layer = cache.layers[0]
    with pytest.raises(Exception, match=r"room for 20 of the budget of 100 tokens: call cache\.reserve\(\)"):
        torch.compile(lambda: layer._make_room(1), backend="eager", fullgraph=True)()
    cache.reserve()
    torch.compile(lambda: layer._make_room(1), backend="eager", fullgraph=True)()


def test_a_sliding_layer_with_room_for_its_window_is_exact_whatever_the_sinks():
    model, ids = tiny("mistral"), prompt(3 * WINDOW, batch=2)
    cache = EvictingCache(model, policy=H2O(sinks=4), budget=100)
    # the sinks leave the window while decoding
    pieces = [WINDOW - 2, *[1] * (2 * WINDOW + 2)]
    expected = feed_all(model, DynamicCache(config=model.config), ids, pieces)
    torch.testing.assert_close(feed_all(model, cache, ids, pieces), expected, atol=2e-5, rtol=1e-4)


# README: A count too small for a choice is refused
def test_a_budget_without_room_for_recent_and_sinks_is_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"budget must be at least sinks \+ recent \+ 1 to choose = 10 tokens"):
        H2OCache(model, budget=9, recent=5, sinks=4)
    with pytest.raises(ValueError, match="recent must be at least 1"):
        H2OCache(model, budget=8, recent=0)
    with pytest.raises(ValueError, match="sinks must be 0 tokens or more"):
        H2OCache(model, budget=8, sinks=-1)
