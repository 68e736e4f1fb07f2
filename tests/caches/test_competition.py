"""Heads that compete for one budget: how many tokens each may keep."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch

from kvcompress import TOVA, AttentionMatchingCache, EvictingCache, H2OCache, KeyDiff, KVzipCache, Policy
from kvcompress.caches.competition import shares
from kvcompress.policies.gear import GEAR
from tests.contract.caches import by_name
from tests.contract.drive import feed, generate, tokens_kept
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle

INF = torch.inf
# batches of other sizes sum in another order
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def counted(worth, pool, floor=0):
    """`shares` of one sequence, as lists."""
    pool, floor = torch.tensor([pool]), torch.tensor([floor])
    return [each[0].tolist() for each in shares([torch.tensor([layer]) for layer in worth], pool, floor)]


def test_the_best_tokens_of_all_heads_stay():
    worth = [[[5.0, 1, 4], [2, 0, 3]], [[9, 8, 7], [0.5, 0.4, 0.3]]]
    assert counted(worth, 6) == [[2, 1], [3, 0]]


def test_what_must_stay_counts_first_and_what_must_go_not_at_all():
    worth = [[[INF, 1, 2, -INF], [INF, 9, -INF, -INF]]]
    assert counted(worth, 3) == [[1, 2]]
    # the three places that are left are nobody's, and are shared out as far as they go
    assert counted(worth, 8) == [[4, 3]]


def test_each_head_keeps_at_least_the_floor_of_what_it_has():
    worth = [[[9.0, 8, 7, 6], [1, 2, 3, 0]]]
    assert counted(worth, 4) == [[4, 0]]
    assert counted(worth, 4, floor=2) == [[2, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_the_pool_is_used_but_for_rounding_and_few_numbers_occur(seed):
    torch.manual_seed(seed)
    layers, heads, candidates, batch = 3, 4, 300, 5
    spread = torch.rand(layers, batch, heads, 1) * 8
    worth = [torch.randn(batch, heads, candidates) + part for part in spread]
    pool = torch.randint(layers * heads * 10, layers * heads * 250, (batch,))
    found = torch.cat(shares(worth, pool, torch.full((batch,), 5)), 1)
    assert (found.sum(1) <= pool).all()
    assert (found.sum(1) >= 0.95 * pool).all()
    assert (found >= 5).all()
    assert (found <= candidates + pool[:, None]).all()
    flat = torch.cat(worth, 1)
    flat = flat.scatter(-1, flat.topk(5).indices, INF)
    for row in range(batch):
        best = flat[row].flatten().sort(descending=True).values[pool[row] - 1]
        exact = (flat[row] >= best).sum(-1)
        # a number moves by no more than the step between those that occur
        assert ((found[row] - exact).abs() <= exact / 4 + 2).all()


def test_a_sequence_gets_the_same_shares_alone():
    torch.manual_seed(0)
    worth = [torch.randn(3, 2, 40) for _ in range(2)]
    pool, floor = torch.tensor([50, 61, 12]), torch.tensor([2, 3, 1])
    together = shares(worth, pool, floor)
    for row in range(3):
        one = slice(row, row + 1)
        # filler of a longer neighbour in between changes nothing
        padded = [torch.cat([each[one], torch.full((1, 2, 7), -INF)], -1).roll(3, -1) for each in worth]
        for of_row in ([each[one] for each in worth], padded):
            alone = shares(of_row, pool[one], floor[one])
            assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


# docs: `allocation="heads"` lets the heads of a layer compete for its budget: for H2O, SnapKV, ExpectedAttention and
# docs: KVzip, whose scores compare across heads
@pytest.mark.parametrize("policy", [TOVA(), KeyDiff()])
def test_heads_whose_scores_do_not_compare_cannot_compete(policy):
    with pytest.raises(ValueError, match=f"scores of {type(policy).__name__} do not compare across heads: use alloc"):
        EvictingCache(tiny(), policy=policy, budget=8, allocation="heads")


# docs: lets all heads of all layers compete: for KVzip and AttentionMatching, which do so by default
def test_layers_whose_scores_do_not_compare_cannot_compete():
    with pytest.raises(ValueError, match="scores of H2O do not compare across layers: use allocation='heads'"):
        H2OCache(tiny(), budget=8, allocation="global")
    assert all(kind(tiny(), budget=8).allocation == "global" for kind in (KVzipCache, AttentionMatchingCache))
    packed = KVzipCache(tiny(), budget=8, packed=GEAR(bits=4, rank=0))
    assert packed.allocation == "global"


# docs: Where heads compete, they keep different numbers of tokens, and memory is what is kept
# docs: Slots may be packed: the room of each head is then a multiple of 16 tokens
@pytest.mark.parametrize("packed", [None, GEAR(bits=4)])
def test_bytes_are_those_of_what_is_kept_not_of_the_longest_head(packed):
    """One head of two, in two layers of three, is looked up far more than the others."""
    model = build("llama", head_dim=64)
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            # nearly flat attention in one group of heads, sharp in the other: maxima far apart
            layer.self_attn.q_proj.weight[: layer.self_attn.q_proj.weight.shape[0] // 2] *= 0.01
            layer.self_attn.q_proj.weight[layer.self_attn.q_proj.weight.shape[0] // 2 :] *= 8
    ragged, even = (KVzipCache(model, budget=100, allocation=name, packed=packed) for name in ("global", "uniform"))
    for cache in (ragged, even):
        feed(model, cache, prompt(800))
    kept = torch.stack(tokens_kept(ragged)).flatten()
    assert kept.max() >= 5 * kept.min(), kept
    assert kept.float().mean() <= 100
    # of packed slots those of the last block, too
    assert ragged.memory().total_bytes <= (1.05 if packed is None else 1.12) * even.memory().total_bytes
    if packed is not None:
        assert all(bool((layer.slots.capacities % 16 == 0).all()) for layer in ragged.layers)
    # as wide as the longest, they would be far larger
    assert int(kept.max()) > 150


@pytest.mark.parametrize("budget", [12, 0.4])
def test_a_clone_a_choice_of_rows_and_a_file_hold_what_the_cache_held(budget, tmp_path):
    model = tiny()
    cache = KVzipCache(model, budget=budget, allocation="global", sinks=1, keeps_answers=False)
    feed(model, cache, prompt(40, 3))
    cache.save(tmp_path / "cache")
    loaded = KVzipCache.load(tmp_path / "cache", model)
    chosen = cache.clone()
    rows = torch.tensor([2, 0, 0], device=DEVICE)
    chosen.reorder_cache(rows)
    doubled = cache.clone()
    doubled.batch_repeat_interleave(2)
    straight = []
    for step in range(20):
        token = prompt(1, 3, seed=step)
        straight.append(feed(model, cache, token))
        assert torch.equal(feed(model, loaded, token), straight[-1])
        close(feed(model, chosen, token[rows]), straight[-1][rows])
        close(feed(model, doubled, token.repeat_interleave(2, 0)), straight[-1].repeat_interleave(2, 0))
    for before, after in zip(tokens_kept(cache), tokens_kept(chosen), strict=True):
        assert torch.equal(before[rows.cpu()], after.cpu())
    doubled.batch_select_indices(torch.tensor([0, 2, 4], device=DEVICE))
    close(feed(model, doubled, prompt(5, 3)), feed(model, cache, prompt(5, 3)))


def test_room_grows_for_a_growing_budget_and_a_short_beginning():
    model = tiny()
    for budget, tokens in itertools.product((30, 0.5), (3, 20)):
        cache = KVzipCache(model, budget=budget, allocation="global", sinks=1, keeps_answers=False)
        feed(model, cache, prompt(tokens, 2))
        for step in range(60):
            feed(model, cache, prompt(1, 2, seed=step))
        mean = torch.stack(tokens_kept(cache)).float().mean((0, 2))
        allowed = 30 if budget == 30 else (tokens + 60) // 2
        assert (mean <= allowed).all()
        assert (mean >= allowed - 2).all()


# docs: How many each may keep is decided after every forward of several tokens; in between, a head drops a token for
# docs: each that it takes in
# README: while `"heads"` and `"global"` let heads compete for it
@pytest.mark.parametrize("allocation", ["heads", "global"])
def test_shares_change_with_chunks_and_not_with_single_tokens(allocation):
    model = tiny()
    cache = KVzipCache(model, budget=12, allocation=allocation, sinks=1, keeps_answers=False)
    feed(model, cache, prompt(60))
    first = torch.stack(tokens_kept(cache))
    for step in range(10):
        feed(model, cache, prompt(1, seed=step))
    assert torch.equal(torch.stack(tokens_kept(cache)), first)
    assert len(first.unique()) > 1
    feed(model, cache, prompt(60, seed=5))
    assert not torch.equal(torch.stack(tokens_kept(cache)), first)


# docs: A policy whose scores compare across the heads of a layer says so by the class attribute `compares = "heads"`
def test_a_policy_of_ones_own_may_compare_heads():
    @dataclass(frozen=True, kw_only=True)
    class ValueNorm(Policy):
        def score(self, candidates):
            return candidates.values.float().norm(dim=-1)

    model = build("llama")
    with pytest.raises(ValueError, match="scores of ValueNorm do not compare across heads"):
        EvictingCache(model, policy=ValueNorm(), budget=8, allocation="heads")
    ValueNorm.compares = "heads"
    cache = EvictingCache(model, policy=ValueNorm(), budget=8, allocation="heads")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:4] *= 100
    feed(model, cache, prompt(40))
    assert tokens_kept(cache)[0][0, 0] > tokens_kept(cache)[0][0, 1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("allocation", ["heads", "global"])
def test_a_padded_row_keeps_what_it_does_alone_one_token_or_many_at_a_time(family, allocation):
    model, rows = tiny(family), [prompt(50)[0], prompt(31, seed=2)[0]]
    ids, mask = left_padded(rows)
    # the second row gets a single token where the first gets several
    more, shown = prompt(9, 2, seed=3), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    shown[1, :8] = 0
    cache, alone = (KVzipCache(model, budget=10, allocation=allocation, sinks=1, keeps_answers=False) for _ in range(2))
    feed(model, cache, ids, mask)
    whole = torch.cat([mask, shown], 1)
    feed(model, cache, more, whole)
    last = feed(model, cache, prompt(1, 2, seed=7), torch.cat([whole, whole[:, -1:]], 1))
    feed(model, alone, rows[1][None])
    feed(model, alone, more[1:, 8:])
    close(last[1:], feed(model, alone, prompt(1, 2, seed=7)[1:]))
    for together, single in zip(cache.layers, alone.layers, strict=True):
        held = [[sorted(p for p in head if p >= 0) for head in row] for row in together.slots.positions.tolist()]
        assert held[1] == [sorted(p for p in head if p >= 0) for head in single.slots.positions[0].tolist()]


@pytest.mark.parametrize("budget", [64, 0.5])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_heads_take_room_as_they_grow(bits, budget):
    """From a few tokens to more than two blocks of slots, step by step and at once."""
    model = tiny(dtype=torch.float64)
    how = {"allocation": "heads", "packed": GEAR(bits=bits, group_size=8)}
    entry = by_name["h2o_packed_heads"]
    cache = H2OCache(model, budget=budget, **how)
    with entry.recording(model, cache) as transcript:
        generate(model, cache, prompt(12, 2), max_new_tokens=70)
    assert torch.stack(tokens_kept(cache)).max() >= 40
    assert_equals_oracle(model, transcript)
    other = H2OCache(model, budget=64, **how)
    with entry.recording(model, other) as transcript:
        feed(model, other, prompt(12, 2))
        other.reserve(50)
        assert all(bool((layer.slots.capacities >= 65).all()) for layer in other.layers)
        feed(model, other, prompt(1, 2, seed=1))
    assert_equals_oracle(model, transcript)
