"""What a cache holds already, compacted."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from kvcompress import (
    AttentionMatchingCache,
    DenseCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    SnapKVCache,
    release,
)
from kvcompress.caches import answers, compaction
from kvcompress.caches.matching import match
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from tests.contract.caches import uneven
from tests.contract.drive import feed, generate
from tests.contract.models import build, families, left_padded, prompt, tiny

README = Path(__file__).parents[2] / "README.md"
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
ALL_AND_WINDOWS = families("llama", "gemma2", slow=("mistral", "gemma3", "gpt_oss", "gpt_neox", "opt"))


def fed(kind, model, ids, mask=None, **settings):
    cache = kind(model, **settings)
    feed(model, cache, ids, mask)
    return cache


def held(cache):
    """What a cache holds, as tensors by name."""
    return {f"{index}.{name}": x for index, layer in enumerate(cache.layers) for name, x in layer.dump()[0].items()}


def mean_kept(cache):
    """Tokens of each row, on average over heads and layers."""
    return torch.cat([layer.tokens_kept() for layer in cache.layers], 1).double().mean(-1)


def divergence(full, other):
    full, other = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((full.exp() * (full - other)).sum(-1).mean())


# docs: With the text that a `DenseCache` was fed it is the cache that you would have got by feeding the text to it
@ALL_AND_WINDOWS
@pytest.mark.parametrize("settings", [{}, {"chunk": 7}, {"budget": 0.3}, {"allocation": "pyramid"}], ids=str)
def test_a_dense_cache_is_compacted_to_what_a_cache_fed_the_text_holds(family, settings):
    model, ids, settings = tiny(family), prompt(40), {"budget": 12, "sinks": 1, **settings}
    dense = fed(DenseCache, model, ids)
    before = feed(model, dense.clone(), prompt(3, seed=2))
    cache = AttentionMatchingCache.from_cache(dense, ids, **settings)
    wanted = fed(AttentionMatchingCache, model, ids, **settings)
    found = held(cache)
    for name, tensor in held(wanted).items():
        if name.endswith(("positions", "capacities", "lengths", "limits", "recents", "surplus", "seen")):
            assert torch.equal(found[name], tensor), name
        elif name.endswith(("keys", "values", "log_weights")):
            close(found[name], tensor)
    close(feed(model, cache, prompt(3, seed=2)), feed(model, wanted, prompt(3, seed=2)))
    # the other is as it was
    assert torch.equal(feed(model, dense, prompt(3, seed=2)), before)


# docs: A budget of what is held or more changes nothing.
@ALL_AND_WINDOWS
@pytest.mark.parametrize("allocation", [None, "heads", "uniform"])
@pytest.mark.parametrize("budget", [64, 1.0])
def test_a_budget_of_all_that_is_held_changes_no_logits(family, allocation, budget):
    model = tiny(family)
    cache = fed(AttentionMatchingCache, model, prompt(40, 2), budget=16, allocation=allocation)
    for seed in range(5):
        feed(model, cache, prompt(1, 2, seed=10 + seed))
    before, kept = feed(model, cache.clone(), prompt(3, 2, seed=2)), mean_kept(cache)
    cache.compact(prompt(30, 2, seed=3), budget=budget)
    # what has left a window may go
    assert (mean_kept(cache) == kept).all() or any(layer.is_sliding for layer in cache.layers)
    close(feed(model, cache, prompt(3, 2, seed=2)), before)


# docs: `compact` frees memory: answers since the last text are compacted with the text
def test_answers_are_compacted_with_the_text_and_bytes_are_freed():
    model = tiny()
    cache = AttentionMatchingCache(model, budget=16)
    out = generate(model, cache, prompt(60), max_new_tokens=30)
    before, seen = cache.memory(), cache.get_seq_length()
    assert mean_kept(cache) > 40
    cache.compact(out)
    after = cache.memory()
    assert 14 <= mean_kept(cache) <= 16
    assert after.total_bytes < 0.6 * before.total_bytes
    assert "tail" not in after.by_component
    assert cache.get_seq_length() == seen
    assert any((layer.slots.bias != 0).any() for layer in cache.layers)


def test_a_dense_cache_takes_less_when_it_is_compacted():
    model, ids = tiny(), prompt(200)
    dense = fed(DenseCache, model, ids)
    cache = AttentionMatchingCache.from_cache(dense, ids, budget=0.1)
    assert cache.memory().total_bytes < 0.2 * dense.memory().total_bytes


# docs: `budget` is the cache's own if you leave it out, a count, or a fraction of what is held.
@pytest.mark.parametrize("allocation", [None, "heads", "uniform", "pyramid"])
@pytest.mark.parametrize(("budget", "wanted"), [(None, 20), (10, 10), (0.5, 10), (30, 20)])
def test_a_budget_is_the_caches_own_a_count_or_a_fraction_of_what_is_held(allocation, budget, wanted):
    model, ids = tiny(), prompt(80)
    cache = fed(AttentionMatchingCache, model, ids, budget=20, allocation=allocation)
    limits = [layer.limits.clone() for layer in cache.layers]
    cache.compact(ids, budget=budget)
    # no layer of a pyramid keeps less than what is always kept and one more
    assert wanted - 1.5 <= mean_kept(cache) <= wanted + (allocation == "pyramid" and isinstance(budget, float))
    assert all(torch.equal(layer.limits, own) for layer, own in zip(cache.layers, limits, strict=True))
    # the next text finds the cache's own budget
    feed(model, cache, prompt(40, seed=4))
    assert 18 <= mean_kept(cache) <= 20


@pytest.mark.parametrize("budget", [10, 0.5])
def test_a_number_where_the_mask_belongs_is_the_budget(budget):
    model, ids = tiny(), prompt(80)
    named, placed = (fed(AttentionMatchingCache, model, ids, budget=20) for _ in range(2))
    named.compact(ids, budget=budget)
    placed.compact(ids, budget)
    assert 8 <= mean_kept(placed) <= 10
    assert torch.equal(feed(model, placed, prompt(3)), feed(model, named, prompt(3)))


# docs: Five compactions in a row stay sane
def test_five_compactions_in_a_row_stay_sane():
    model, ids, after = tiny(dtype=torch.float64), prompt(200), prompt(20, seed=2)
    dense = fed(DenseCache, model, ids)
    full = feed(model, dense.clone(), after)
    cache = AttentionMatchingCache.from_cache(dense, ids, budget=200)
    far = [divergence(full, feed(model, cache.clone(), after))]
    for budget in (150, 100, 60, 40, 24):
        cache.compact(ids, budget=budget)
        assert budget - 2 <= mean_kept(cache) <= budget
        logits = feed(model, cache.clone(), after)
        assert logits.isfinite().all()
        assert all(layer.slots.bias.isfinite().all() for layer in cache.layers)
        far.append(divergence(full, logits))
    assert far[0] < 1e-9
    # the less the farther, and not much farther than what is had at once
    assert all(later > 0.8 * earlier for earlier, later in itertools.pairwise(far))
    once = AttentionMatchingCache.from_cache(dense, ids, budget=24)
    assert far[-1] < 2 * divergence(full, feed(model, once, after))


def test_compactions_to_what_is_held_already_change_nothing_however_many():
    model, ids = tiny(), prompt(80)
    cache = fed(AttentionMatchingCache, model, ids, budget=20)
    wanted = feed(model, cache.clone(), prompt(3, seed=2))
    for _ in range(5):
        cache.compact(ids)
    close(feed(model, cache, prompt(3, seed=2)), wanted)


def test_log_weights_count_in_what_is_chosen_and_fitted():
    # a token that counts as many is one that answers look up, and its mass is not lost
    model, ids = tiny(dtype=torch.float64), prompt(60)
    cache = fed(AttentionMatchingCache, model, ids, budget=30)
    twice = cache.clone()
    for layer in twice.layers:
        positions = layer.slots.positions
        stays = (positions < 4) | (positions == 59)
        worst = layer.slots.scores.masked_fill(stays, torch.inf).argmin(-1, keepdim=True)
        layer.slots.weigh(layer.slots.bias.scatter(-1, worst, 12.0))
        layer.worst = layer.slots.positions.gather(-1, worst)
    for each in (cache, twice):
        each.compact(ids, budget=10)
    stays = [
        [(layer.slots.positions == other.worst).any(-1) for layer in (mine, other)]
        for mine, other in zip(cache.layers, twice.layers, strict=True)
    ]
    light, heavy = (torch.stack([pair[side] for pair in stays]).double().mean() for side in (0, 1))
    assert light < 0.5
    assert heavy == 1.0


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_is_fitted_to_is_attention_with_the_log_weights(monkeypatch, softcap):
    given = []

    def spy(*args):
        given.append(args)
        return match(*args)

    model, ids = tiny("llama" if softcap is None else "gemma2"), prompt(60, 2)
    cache = fed(AttentionMatchingCache, model, ids, budget=16)
    monkeypatch.setattr("kvcompress.caches.compaction.match", spy)
    cache.compact(ids, budget=9)
    assert len(given) == sum(not layer.is_sliding for layer in cache.layers)
    for (asked,), key, _, bias, blocks, _, spec in given:
        assert spec.softcap == softcap
        assert (bias != 0).any()
        group = asked.query.shape[1] // key.shape[1]
        logits = spec.cap_(asked.query @ key.repeat_interleave(group, 1).mT * spec.scale)
        weighted = (logits.unflatten(1, (-1, group)) + bias[:, :, None, None]).masked_fill(
            blocks[:, :, None, None] < 0, -torch.inf
        )
        # what the queries gave to the tokens is all that they gave
        close(weighted.logsumexp(-1).flatten(1, 2), asked.lse)


@pytest.mark.parametrize("settings", [{"budget": 12}, {"budget": 0.3, "chunk": 7, "sinks": 1}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_other_lengths_are_compacted_as_they_would_be_alone(family, settings):
    model = tiny(family, dtype=torch.float64)
    texts = [prompt(40)[0], prompt(23, seed=2)[0]]
    read = [prompt(15, seed=3)[0], prompt(28, seed=4)[0]]
    ids, mask = left_padded(texts)
    asked, shown = left_padded(read)
    longer = torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
    for begin in (ids, asked):
        # the text itself, or another one
        text, text_mask = (ids, mask) if begin is ids else (asked, shown)
        dense = fed(DenseCache, model, ids, mask)
        caches = [AttentionMatchingCache.from_cache(dense, text, text_mask, **settings)]
        caches.append(fed(AttentionMatchingCache, model, ids, mask, **settings))
        caches[1].compact(text, text_mask, budget=0.6)
        for row in range(2):
            own = texts[row][None] if begin is ids else read[row][None]
            alone = [AttentionMatchingCache.from_cache(fed(DenseCache, model, texts[row][None]), own, **settings)]
            alone.append(fed(AttentionMatchingCache, model, texts[row][None], **settings))
            alone[1].compact(own, budget=0.6)
            for together, single in zip(caches, alone, strict=True):
                wanted = feed(model, single.clone(), prompt(2, seed=9))[0]
                close(feed(model, together.clone(), prompt(2, seed=9).expand(2, -1), longer)[row], wanted)


# docs: A budget of what is held or more changes nothing
@pytest.mark.parametrize("allocation", ["pyramid", "profile", "heads", "global"])
def test_a_row_that_holds_no_more_than_the_budget_stays_as_it_is_beside_one_that_holds_more(allocation):
    model = tiny(dtype=torch.float64)
    allocation = uneven(model) if allocation == "profile" else allocation
    ids, mask = left_padded([prompt(40)[0], prompt(10, seed=2)[0]])
    cache = fed(AttentionMatchingCache, model, ids, mask, budget=12, sinks=1, allocation=allocation)
    cache.compact(ids, mask, budget=4)
    answer = prompt(11, 2, seed=3)
    for step, token in enumerate(answer.split(1, 1)):
        # the short row ends first
        mask = torch.cat([mask, mask.new_tensor([[1], [step < 5]])], 1)
        feed(model, cache, token, mask)
    before = cache.clone()
    cache.compact(torch.cat([ids, answer], 1), mask)
    was, now = ([layer.tokens_kept() for layer in each.layers] for each in (before, cache))
    assert max(int(kept[1].max()) for kept in was) <= 12
    assert [kept[1].tolist() for kept in was] == [kept[1].tolist() for kept in now]
    assert int(torch.stack(now)[:, 0].sum()) < int(torch.stack(was)[:, 0].sum())
    mask, token = torch.nn.functional.pad(mask, (0, 1), value=1), prompt(1, 2, seed=4)
    close(feed(model, cache, token, mask)[1], feed(model, before, token, mask)[1])


# docs: Afterwards the cache goes on as any other: it decodes, is cloned and saved
def test_a_compacted_cache_decodes_is_cloned_and_saved(tmp_path):
    model, ids = tiny(), prompt(60, 2)
    cache = AttentionMatchingCache(model, budget=16)
    out = generate(model, cache, ids, max_new_tokens=8)
    cache.compact(out)
    cache.save(tmp_path / "cache.safetensors")
    loaded, copied = AttentionMatchingCache.load(tmp_path / "cache.safetensors", model), cache.clone()
    # the last token of the answer was not fed yet
    more = torch.cat([out, prompt(4, 2, seed=7)], 1)
    answers = [generate(model, each, more) for each in (cache, loaded, copied)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    for each in (cache, loaded):
        each.compact(answers[0], budget=10)
    wanted = feed(model, cache, prompt(1, 2, seed=8))
    assert wanted.isfinite().all()
    close(feed(model, loaded, prompt(1, 2, seed=8)), wanted)


def test_tokens_that_follow_come_after_all_that_was_seen():
    model, ids, more = tiny(dtype=torch.float64), prompt(40), prompt(3, seed=2)
    cache = fed(AttentionMatchingCache, model, ids, budget=64)
    cache.compact(ids, budget=10)
    told = feed(model, cache.clone(), more, position_ids=torch.arange(40, 43, device=ids.device)[None])
    # without position ids, the model asks the cache
    with torch.no_grad():
        close(model(more, **cache_argument(model, cache)).logits, told)


# docs: `from_cache` takes a `DenseCache`, and evicting caches that are not rerotated
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (H2OCache, {"budget": 20}),
        (SnapKVCache, {"budget": 20, "window": 4, "allocation": "heads"}),
        (KVzipCache, {"budget": 20}),
        (AttentionMatchingCache, {"budget": 20}),
        (H2OCache, {"budget": 20, "packed": GEAR(bits=8)}),
        (AttentionMatchingCache, {"budget": 20, "packed": GEAR(bits=8)}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_evicting_caches_hold_is_taken_in_with_their_log_weights(kind, settings, family):
    model, ids = tiny(family, dtype=torch.float64), prompt(60, 2)
    other = fed(kind, model, ids, **settings)
    for seed in range(3):
        feed(model, other, prompt(1, 2, seed=10 + seed))
    cache = AttentionMatchingCache.from_cache(other, ids, budget=64)
    assert cache.get_seq_length() == 63
    wanted = feed(model, other.clone(), prompt(1, 2, seed=2))
    close(feed(model, cache.clone(), prompt(1, 2, seed=2)), wanted)
    smaller = AttentionMatchingCache.from_cache(other, ids, budget=10)
    assert 8 <= mean_kept(smaller).max() <= 10
    assert feed(model, smaller, prompt(3, 2, seed=2)).isfinite().all()


def test_a_sliding_layer_that_has_dropped_tokens_is_taken_in_where_they_stand(monkeypatch):
    monkeypatch.setattr("kvcompress.caches.dense.SLACK", 4)
    model = tiny("mistral", dtype=torch.float64)
    ids, mask = left_padded([prompt(60)[0], prompt(37, seed=2)[0]])
    dense = fed(DenseCache, model, ids, mask)
    assert all(layer.dropped for layer in dense.layers)
    cache = AttentionMatchingCache.from_cache(dense, ids, mask, budget=64)
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    token = prompt(1, 2, seed=5)
    close(feed(model, cache, token, longer), feed(model, dense, token, longer))


REFUSED = [
    ({}, {"budget": 5}, ValueError, "budget must be at least sinks . recent . 1 to choose = 6 tokens"),
    ({}, {"budget": 0.1}, ValueError, "a budget of 0.1 of 20 tokens held is 2, and must be at least sinks"),
    ({}, {"budget": 1.5}, ValueError, "a fraction of the tokens held in"),
    ({}, {"budget": "12"}, TypeError, "budget must be a count of tokens"),
    ({"ids": prompt(30)}, {}, ValueError, r"input_ids must be \[batch=2, tokens\], got \[1, 30\]"),
    ({"ids": prompt(30)[0]}, {}, ValueError, r"input_ids must be \[batch=2, tokens\], got \[30\]"),
    ({"ids": prompt(1, 2)}, {}, ValueError, "at least 2 tokens is read for each row, row 0 has 1"),
    ({"mask": torch.ones(2, 29)}, {}, ValueError, r"attention_mask must be like input_ids, \[2, 30\], got \[2, 29\]"),
    ({"mask": "12"}, {}, TypeError, "attention_mask must be a tensor like input_ids, got '12'"),
    ({"mask": 0.5}, {"budget": 12}, TypeError, "the budget must be given once, got 0.5 and budget=12"),
    ({"mask": 1.5}, {}, ValueError, "a fraction of the tokens held in"),
    ({"mask": torch.eye(2).repeat_interleave(15, 1)}, {}, None, ""),
    ({"mask": torch.eye(2)[:, :1].expand(2, 30)}, {}, ValueError, "row 1 has 0"),
]


# docs: What cannot be done raises an error and leaves the cache as it was
@pytest.mark.parametrize(("text", "settings", "error", "message"), REFUSED)
def test_what_is_refused_leaves_the_cache_as_it_was(text, settings, error, message):
    model = tiny()
    cache = fed(AttentionMatchingCache, model, prompt(40, 2), budget=16)
    for seed in range(4):
        feed(model, cache, prompt(1, 2, seed=10 + seed))
    before = {name: tensor.clone() for name, tensor in held(cache).items()}
    ids, mask = text.get("ids", prompt(30, 2, seed=3)), text.get("mask")
    mask = mask.to(ids.device) if isinstance(mask, torch.Tensor) else mask
    if error is None:
        # different tokens of the rows may be shown
        cache.compact(ids, mask, **settings)
        return
    with pytest.raises(error, match=message):
        cache.compact(ids, mask, **settings)
    after = held(cache)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_empty_cache_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="this AttentionMatchingCache is empty: feed it tokens first"):
        AttentionMatchingCache(model, budget=12).compact(prompt(30))
    with pytest.raises(ValueError, match="this DenseCache is empty"):
        AttentionMatchingCache.from_cache(DenseCache(model), prompt(30), budget=12)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(GEARCache, bits=4),
        HydragenCache,
        functools.partial(H2OCache, budget=12, rerotated=True),
    ],
    ids=["gear", "hydragen", "rerotated"],
)
def test_caches_that_hold_other_than_plain_tokens_are_refused_by_name(build):
    model = tiny()
    other = build(model)
    feed(model, other, prompt(40))
    with pytest.raises(TypeError, match=f"that is not rerotated, got {type(other).__name__}"):
        AttentionMatchingCache.from_cache(other, prompt(40), budget=12)


def test_a_reading_that_fails_leaves_what_was_held(monkeypatch):
    model = tiny()
    cache = fed(AttentionMatchingCache, model, prompt(40), budget=16)
    feed(model, cache, prompt(1, seed=3))
    wanted = feed(model, cache.clone(), prompt(1, seed=2))

    def fails(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("kvcompress.layer.CompressedLayer.attend_causally", fails)
        with pytest.raises(MemoryError, match="no room"):
            cache.compact(prompt(30))
    close(feed(model, cache.clone(), prompt(1, seed=2)), wanted)
    cache.compact(prompt(30), budget=10)
    assert mean_kept(cache) <= 10


@pytest.mark.parametrize("allocation", ["global", "pyramid"])
@pytest.mark.parametrize("budget", [1.0, 90, 1 << 29])
def test_a_budget_of_all_that_is_held_leaves_every_number_as_it_was(allocation, budget):
    model, ids = tiny(), prompt(90)
    cache = fed(AttentionMatchingCache, model, ids, budget=30, allocation=allocation)
    before = {name: tensor.clone() for name, tensor in held(cache).items()}
    cache.compact(ids, budget=budget)
    assert all(torch.equal(before[name], tensor) for name, tensor in held(cache).items())


@pytest.mark.parametrize("ids", [[[1, 2, 3]], torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)], ids=type)
def test_a_text_is_a_tensor_of_token_ids(ids):
    cache = fed(AttentionMatchingCache, tiny(), prompt(20), budget=8)
    with pytest.raises(TypeError, match="input_ids must be a tensor of token ids, int64 or int32, got"):
        cache.compact(ids, budget=6)


def test_what_another_model_filled_is_not_read_with_this_one():
    model, other, ids = build("llama"), build("llama", seed=5), prompt(40)
    dense, cache = DenseCache(model), AttentionMatchingCache(model, budget=30)
    DenseCache(other)
    for each in (dense, cache):
        feed(other, each, ids)
    with pytest.raises(ValueError, match="was filled by another model"):
        cache.compact(ids, budget=10)
    with pytest.raises(ValueError, match="was filled by another model"):
        AttentionMatchingCache.from_cache(dense, ids, budget=10)


def test_a_model_that_has_been_released_is_not_read_with():
    model, ids = build("llama"), prompt(40)
    cache = fed(AttentionMatchingCache, model, ids, budget=30)
    release(model)
    with pytest.raises(RuntimeError, match="did not attend through it"):
        cache.compact(ids, budget=10)


# docs: only if memory runs out while heads choose must it be reset
@pytest.mark.parametrize("compacts", [True, False])
def test_a_cache_whose_layers_have_not_all_chosen_is_refused(compacts, monkeypatch, tmp_path):
    model, ids, calls = tiny(), prompt(40), itertools.count()

    def runs_out(*args):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no more")
        return match(*args)

    cache = AttentionMatchingCache(model, budget=20)
    if compacts:
        feed(model, cache, ids)
    monkeypatch.setattr(compaction if compacts else answers, "match", runs_out)
    chooses = (lambda: cache.compact(ids, budget=10)) if compacts else (lambda: feed(model, cache, ids))
    with pytest.raises(torch.OutOfMemoryError):
        chooses()
    for goes_on in (
        lambda: feed(model, cache, prompt(2, seed=3)),
        lambda: cache.compact(ids, budget=10),
        lambda: cache.save(tmp_path / "cache"),
        lambda: feed(model, cache.clone(), prompt(2, seed=3)),
    ):
        with pytest.raises(RuntimeError, match="interrupted, and its layers disagree: call cache.reset"):
            goes_on()
    cache.reset()
    close(feed(model, cache, ids), feed(model, AttentionMatchingCache(model, budget=20), ids))


# docs: what the text does not look up is lost
@pytest.mark.slow
def test_on_real_text_a_dense_cache_is_compacted_as_well_as_a_prompt(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(README.read_text(), return_tensors="pt").input_ids[:, :300].to(model.device)
    dense = fed(DenseCache, model, ids[:, :256])
    full = feed(model, dense.clone(), ids[:, 256:])
    caches = [
        AttentionMatchingCache.from_cache(dense, ids[:, :256], budget=0.15),
        fed(AttentionMatchingCache, model, ids[:, :256], budget=0.15),
        fed(KVzipCache, model, ids[:, :256], budget=0.15),
    ]
    caches.append(AttentionMatchingCache.from_cache(dense, ids[:, 192:256], budget=0.15))
    own, prompts, kvzip, of_a_part = (divergence(full, feed(model, cache, ids[:, 256:])) for cache in caches)
    assert abs(own - prompts) < 0.05 * prompts
    assert own < 0.6 * kvzip
    assert of_a_part > 2 * own


def test_packed_slots_are_compacted_again_and_again():
    """Without new tokens nothing is learnt; what stays keeps its codes, and what is fitted is packed again."""
    model, ids = tiny(dtype=torch.bfloat16), prompt(64, 2)
    cache = AttentionMatchingCache(model, budget=24, packed=GEAR(bits=4))
    feed(model, cache, ids)
    for budget in (16, 12, 10):
        cache.compact(ids, budget=budget)
        assert 8 <= mean_kept(cache).max() <= budget
    assert feed(model, cache, prompt(3, 2, seed=1)).isfinite().all()
    dense = fed(DenseCache, model, ids)
    taken = AttentionMatchingCache.from_cache(dense, ids, budget=20, packed=GEAR(bits=8))
    assert feed(model, taken, prompt(3, 2, seed=1)).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_values_that_nothing_was_fitted_to_keep_their_codes(bits):
    model = tiny(dtype=torch.bfloat16)
    cache = AttentionMatchingCache(model, budget=400, packed=GEAR(bits=bits))
    feed(model, cache, prompt(64))
    before = [layer.slots.contents()[1][:, :, :64].clone() for layer in cache.layers]
    for turn in range(4):
        feed(model, cache, prompt(2, seed=turn + 10))
    for layer, values in zip(cache.layers, before, strict=True):
        order = layer.slots.positions.masked_fill(layer.slots.positions < 0, 1000).argsort(-1)[..., :64]
        now = layer.slots.contents()[1].gather(2, order[..., None].expand_as(values))
        assert torch.equal(now, values)
