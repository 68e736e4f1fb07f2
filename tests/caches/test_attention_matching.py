"""What is kept of a text, fitted to answer as all of it did."""

import functools
from pathlib import Path

import pytest
import torch

from kvcompress import GEAR, AttentionMatching, AttentionMatchingCache, DenseCache, KVzipCache
from kvcompress.caches.matching import Asked, match
from kvcompress.kernels.common.logits import LogitSpec
from tests.contract.drive import feed, generate
from tests.contract.models import left_padded, prompt, tiny

TOKENS, DIM = 40, 8
README = Path(__file__).parents[2] / "README.md"
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def scene(seed=0, batch=2, kv_heads=2, group=3, queries=64, chunks=1, dtype=torch.float64):
    """Queries that saw a text, its tokens, and a choice of a quarter of them."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    spec = LogitSpec(DIM**-0.5)
    key, value = numbers(batch, kv_heads, TOKENS, DIM), numbers(batch, kv_heads, TOKENS, DIM)
    bias = torch.zeros(batch, kv_heads, TOKENS, dtype=dtype)
    asked = []
    for _ in range(chunks):
        query = 2 * numbers(batch, kv_heads * group, queries, DIM)
        asked.append(Asked(query, logits(query, key, bias, spec).logsumexp(-1)))
    order = numbers(batch, kv_heads, TOKENS).argsort(-1)
    kept = torch.zeros(batch, kv_heads, TOKENS, dtype=torch.bool).scatter(2, order[..., : TOKENS // 4], True)
    # heads keep different numbers
    kept[:, 0, : TOKENS // 2] = True
    blocks = (1 + torch.arange(TOKENS) * chunks // TOKENS).expand(batch, kv_heads, -1)
    return asked, key, value, bias, blocks, kept, spec


def logits(query, key, bias, spec):
    """[batch, heads, queries, tokens]."""
    group = query.shape[1] // key.shape[1]
    products = query @ key.repeat_interleave(group, 1).mT * spec.scale
    return spec.cap_(products) + bias.repeat_interleave(group, 1)[:, :, None]


def answer(query, key, value, bias, kept, spec):
    """Mass and output of attention to the tokens kept."""
    group = query.shape[1] // key.shape[1]
    weights = logits(query, key, bias, spec).exp() * kept.repeat_interleave(group, 1)[:, :, None]
    mass = weights.sum(-1, keepdim=True)
    return mass, weights @ value.repeat_interleave(group, 1) / mass


def errors(asked, key, value, bias, kept, spec, fitted):
    """Of mass and of output, before the fit and after it."""
    everything = torch.ones_like(kept)
    query = torch.cat([each.query for each in asked], 2)
    mass, out = answer(query, key, value, bias, everything, spec)
    found = []
    for values, weights in ((value, bias), fitted):
        own_mass, own_out = answer(query, key, values, weights, kept, spec)
        found.append((float(((own_mass - mass) / mass).square().mean()), float((own_out - out).square().mean())))
    return found


# README: | `attention_matching` | `AttentionMatchingCache` | as `kvzip`, with weights and values fitted
# docs: gives each token that it keeps a weight and a value, fitted to the queries of the second reading so that the few
# docs: attend and answer as all did
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_mass_and_output_come_much_closer_to_those_of_all_tokens(seed, chunks, softcap):
    asked, key, value, bias, blocks, kept, spec = scene(seed, chunks=chunks)
    spec = spec._replace(softcap=softcap)
    asked = [Asked(each.query, logits(each.query, key, bias, spec).logsumexp(-1)) for each in asked]
    fitted = match(asked, key, value, bias, blocks, kept, spec)
    before, after = errors(asked, key, value, bias, kept, spec, fitted)
    assert after[0] < 0.6 * before[0]
    assert after[1] < 0.7 * before[1]
    # nothing else is touched
    close(fitted[0][~kept], value[~kept], rtol=0, atol=0)
    assert (fitted[1][~kept] == 0).all()
    assert (fitted[1].abs() <= 3.0001).all()


def test_the_values_are_the_damped_least_squares_solution_of_each_head():
    asked, key, value, bias, blocks, kept, spec = scene()
    new_value, new_bias = match(asked, key, value, bias, blocks, kept, spec)
    query, lse = asked[0].query, asked[0].lse
    for row in range(2):
        for head in range(2):
            own = slice(3 * head, 3 * head + 3)
            chosen = kept[row, head]
            e = (logits(query, key, bias, spec) - lse[..., None]).exp()[row, own].flatten(0, 1)
            x = e[:, chosen] * new_bias[row, head, chosen].exp()
            x = x * (e.sum(-1, keepdim=True) / x.sum(-1, keepdim=True))
            old = value[row, head, chosen]
            gram = x.mT @ x
            gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            wanted = old + torch.linalg.solve(gram, x.mT @ (e @ value[row, head] - x @ old))
            close(new_value[row, head, chosen], wanted, rtol=1e-6, atol=1e-8)


def test_no_small_change_of_the_weights_brings_the_mass_closer():
    asked, key, value, bias, blocks, kept, spec = scene(batch=1)
    _, new_bias = match(asked, key, value, bias, blocks, kept, spec)
    e = (logits(asked[0].query, key, bias, spec) - asked[0].lse[..., None]).exp()[0].unflatten(0, (2, 3)).flatten(1, 2)
    own = e * kept[0][:, None]
    gram, moment = own.mT @ own, own.mT @ e.sum(-1, keepdim=True)
    weights = new_bias[0].exp()[..., None]
    slope = (gram @ weights - moment)[..., 0]
    scale = (gram @ torch.ones_like(weights))[..., 0]
    # where a weight is at no bound the slope is nearly none; at the lowest it would have to fall on, and so on
    inside = kept[0] & (new_bias[0].abs() < 2.99)
    assert inside.any()
    assert (slope[inside].abs() < 0.02 * scale.amax()).all()


def test_a_head_that_keeps_all_is_left_exactly_as_it_is():
    asked, key, value, bias, blocks, kept, spec = scene()
    kept[0, 1] = True
    new_value, new_bias = match(asked, key, value, bias, blocks, kept, spec)
    assert torch.equal(new_value[0, 1], value[0, 1])
    assert torch.equal(new_bias[0, 1], bias[0, 1])
    assert not torch.equal(new_value[1, 1], value[1, 1])


def test_each_row_is_fitted_as_it_would_be_alone():
    asked, key, value, bias, blocks, kept, spec = scene()
    # the second row had fewer queries
    asked[0].lse[1, :, :30] = torch.inf
    whole = match(asked, key, value, bias, blocks, kept, spec)
    for row in range(2):
        part = slice(row, row + 1)
        own = [Asked(each.query[part], each.lse[part]) for each in asked]
        alone = match(own, key[part], value[part], bias[part], blocks[part], kept[part], spec)
        for mine, together in zip(alone, whole, strict=True):
            close(mine, together[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_are_copies_of_one_another_or_never_asked_for_give_finite_fits(dtype):
    asked, key, value, bias, blocks, kept, spec = scene(dtype=torch.float32)
    key[:, :, ::2] = key[:, :, :1]
    asked[0].lse[1] = torch.inf
    new_value, new_bias = match(asked, key.to(dtype), value.to(dtype), bias, blocks, kept, spec)
    assert new_value.dtype == dtype
    assert new_value.isfinite().all()
    assert new_bias.isfinite().all()
    # nobody asked the second row
    assert torch.equal(new_value[1], value.to(dtype)[1])
    assert (new_bias[1] == 0).all()


def test_what_is_not_a_number_stays_in_its_own_head():
    asked, key, value, bias, blocks, kept, spec = scene()
    clean = match(asked, key, value, bias, blocks, kept, spec)
    key[0, 0, 3] = torch.nan
    spoiled = match(asked, key, value, bias, blocks, kept, spec)
    assert torch.equal(spoiled[0][0, 0], value[0, 0])
    close(spoiled[0][1], clean[0][1], rtol=1e-9, atol=1e-9)
    close(spoiled[1][0, 1], clean[1][0, 1], rtol=1e-9, atol=1e-9)


def test_what_is_not_a_number_in_a_row_s_slots_leaves_the_fits_of_others_as_they_are():
    model, spoiled = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    caches = [AttentionMatchingCache(each, budget=12, sinks=1) for each in (model, spoiled)]
    for each, cache in zip((model, spoiled), caches, strict=True):
        feed(each, cache, prompt(40, 2))
    for layer in caches[1].layers:
        slots = layer.slots
        for head in range(2):
            first = int(slots.starts[1, head])
            slots.keys[first : first + int(slots.capacities[1, head])] = torch.nan
    for each, cache in zip((model, spoiled), caches, strict=True):
        feed(each, cache, prompt(30, 2, seed=3))
    for mine, other in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("bias", "positions"):
            count = int(min(mine.slots.capacities[0].min(), other.slots.capacities[0].min()))
            sides = [getattr(layer.slots, name)[0, :, :count] for layer in (mine, other)]
            assert torch.equal(*sides), name


def test_queries_are_spread_over_each_rows_own_tokens():
    query = torch.arange(10.0)[None, None, :, None].expand(2, 1, -1, 4)
    visible = torch.ones(2, 10, dtype=torch.bool)
    visible[1, :7] = False
    chunk = type("Chunk", (), {"query": query})
    asked = Asked.spread(chunk, visible, torch.zeros(2, 1, 10), 4)
    assert asked.query[0, 0, :, 0].tolist() == [0, 3, 6, 9]
    assert asked.query[1, 0, :3, 0].tolist() == [7, 8, 9]
    assert asked.lse[1, 0].tolist() == [0, 0, 0, torch.inf]


@pytest.mark.slow
def test_on_real_text_a_fitted_cache_is_much_closer_to_the_full_one_than_kvzip(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(README.read_text(), return_tensors="pt").input_ids[:, :300].to(model.device)
    far = {}
    for kind, budget in ((DenseCache, {}), (KVzipCache, {"budget": 0.15}), (AttentionMatchingCache, {"budget": 0.15})):
        cache = kind(model, **budget)
        feed(model, cache, ids[:, :256])
        far[kind] = feed(model, cache, ids[:, 256:]).log_softmax(-1)
    full = far.pop(DenseCache)
    kl = {kind: float((full.exp() * (full - other)).sum(-1).mean()) for kind, other in far.items()}
    assert kl[AttentionMatchingCache] < 0.6 * kl[KVzipCache]


def test_five_texts_in_a_row_are_compacted_and_stay_sane():
    model = tiny()
    cache, full = AttentionMatchingCache(model, budget=24), DenseCache(model)
    gaps = []
    for turn in range(5):
        logits_of = [feed(model, each, prompt(30, seed=turn)) for each in (cache, full)]
        gaps.append(float((logits_of[0] - logits_of[1]).abs().mean() / logits_of[1].abs().mean()))
    assert all(layer.slots.bias.abs().max() <= 15.01 for layer in cache.layers)
    assert all(layer.slots.values.isfinite().all() for layer in cache.layers)
    assert max(gaps) < 2.0


def test_log_weights_and_values_survive_a_file_and_a_copy(tmp_path):
    model = tiny()
    cache = AttentionMatchingCache(model, budget=12)
    feed(model, cache, prompt(40, 2))
    feed(model, cache, prompt(1, 2, seed=3))
    assert any((layer.slots.bias != 0).any() for layer in cache.layers)
    cache.save(tmp_path / "cache.safetensors")
    loaded, copied = AttentionMatchingCache.load(tmp_path / "cache.safetensors", model), cache.clone()
    wanted = feed(model, cache, prompt(5, 2, seed=4))
    for other in (loaded, copied):
        close(feed(model, other, prompt(5, 2, seed=4)), wanted)


# docs: sliding layers are not fitted
def test_sliding_layers_are_evicted_and_not_fitted():
    model = tiny("mistral")
    cache = AttentionMatchingCache(model, budget=12)
    feed(model, cache, prompt(40))
    for layer in cache.layers:
        assert (layer.slots.bias is None) == layer.is_sliding


# README: `kvzip` and `attention_matching` evict only after forwards of several tokens
# docs: The budget is for what is read: tokens decoded afterwards stay on top of it, and compete when several tokens are
# docs: fed again, in the next turn; with `keeps_answers=False` they compete at once
def test_decoded_tokens_are_kept_and_compete_with_the_next_text():
    model = tiny()
    cache = AttentionMatchingCache(model, budget=16)
    ids = prompt(40)
    generate(model, cache, ids, max_new_tokens=10)
    kept = cache.memory().tokens_kept
    means = torch.stack([each.float().mean() for each in kept])
    assert 14 + 9 <= means.mean() <= 16 + 9
    feed(model, cache, prompt(20, seed=5))
    assert torch.stack([each.float().mean() for each in cache.memory().tokens_kept]).mean() <= 16
    assert all(layer.tail is None for layer in cache.layers)
    at_once = KVzipCache(model, budget=16, keeps_answers=False)
    generate(model, at_once, ids, max_new_tokens=10)
    assert torch.stack([each.float().mean() for each in at_once.memory().tokens_kept]).mean() <= 16


def test_rows_of_other_lengths_end_as_they_would_alone():
    model = tiny(dtype=torch.float64)
    rows = [prompt(40)[0], prompt(23, seed=2)[0]]
    ids, mask = left_padded(rows, 40)
    together = AttentionMatchingCache(model, budget=12)
    longer = torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
    logits_of = feed(model, together, ids, mask), feed(model, together, prompt(2, 2, seed=9), longer)
    assert logits_of[1].isfinite().all()
    for row, tokens in enumerate(rows):
        alone = AttentionMatchingCache(model, budget=12)
        feed(model, alone, tokens[None])
        close(feed(model, alone, prompt(2, 2, seed=9)[row : row + 1]), logits_of[1][row : row + 1])


def test_a_row_is_fitted_by_its_own_queries_beside_one_of_more_chunks():
    model = tiny(dtype=torch.float64)
    turns = [[prompt(33)[0], prompt(20, seed=2)[0]], [prompt(29, seed=3)[0], prompt(5, seed=4)[0]], [prompt(4)[0]] * 2]
    parts = [left_padded(rows) for rows in turns]
    together, mask, logits_of = AttentionMatchingCache(model, budget=0.3, sinks=1, chunk=7), None, []
    for ids, shown in parts:
        mask = shown if mask is None else torch.cat([mask, shown], 1)
        logits_of.append(feed(model, together, ids, mask))
    for row in range(2):
        alone = AttentionMatchingCache(model, budget=0.3, sinks=1, chunk=7)
        for rows, found in zip(turns, logits_of, strict=True):
            close(feed(model, alone, rows[row][None])[0], found[row, -len(rows[row]) :])


def test_rows_that_are_fed_nothing_but_padding_right_after_a_text_attend_to_the_text():
    model = tiny()
    cache, alone = (AttentionMatchingCache(model, budget=12) for _ in range(2))
    for each in (cache, alone):
        feed(model, each, prompt(40, 2))
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[:, -1] = 0
    assert feed(model, cache, prompt(1, 2, seed=3), mask).isfinite().all()
    token = prompt(1, 2, seed=4)
    after = feed(model, cache, token, torch.cat([mask, torch.ones_like(mask[:, :1])], 1))
    close(after, feed(model, alone, token))


# docs: What is fitted is packed as well
def test_what_is_fitted_may_be_packed():
    """In 8 bits next to nothing is lost of what was fitted, in 4 some, and bytes are a fraction."""
    model, ids = tiny(), prompt(200, 2)
    caches = [AttentionMatchingCache(model, budget=0.3, packed=how) for how in (None, GEAR(bits=8), GEAR(bits=4))]
    for cache in caches:
        feed(model, cache, ids)
    plain, *packed = (feed(model, cache, prompt(20, 2, seed=3)) for cache in caches)
    losses = [float((each - plain).square().mean() / plain.square().mean()) for each in packed]
    assert losses[0] < 1e-3 < losses[1] < 0.3
    held = [cache.memory().total_bytes for cache in caches]
    assert held[2] < held[1] < 0.6 * held[0]
    # answers are packed with the next text, and not before
    feed(model, caches[2], prompt(1, 2, seed=4))
    tail = caches[2].layers[0].tail
    assert max(tail.held) == 1
    feed(model, caches[2], prompt(2, 2, seed=5))
    assert caches[2].layers[0].tail is None


# docs: fits values and log-weights to keys as they are packed, and packs the values then
def test_a_fit_looks_at_keys_as_they_are_packed(monkeypatch):
    seen = []

    def watched(asked, key, value, bias, blocks, kept, spec):
        seen.append((key.clone(), blocks, kept))
        return match(asked, key, value, bias, blocks, kept, spec)

    monkeypatch.setattr("kvcompress.caches.answers.match", watched)
    model, ids = tiny(dtype=torch.float64), prompt(60, 2)
    cache = AttentionMatchingCache(model, budget=20, packed=GEAR(bits=2))
    feed(model, cache, ids)
    for layer, (keys, blocks, kept) in zip(cache.layers, seen, strict=True):
        held, there = layer.slots.contents()[0], layer.slots.positions >= 0
        at = layer.slots.positions.clamp(min=0).long()[..., None].expand_as(held)
        # the slots, which are empty, stand before the text
        of_text = keys[:, :, -ids.shape[1] :].gather(2, at)
        torch.testing.assert_close(held[there], of_text[there])
        assert int(there.sum()) == int((kept & (blocks > 0)).sum())


@pytest.mark.parametrize("setting", ["chunk", "queries"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1 token, got 0"):
        AttentionMatching(**{setting: 0})
