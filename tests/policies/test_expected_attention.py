"""ExpectedAttention against its formula and against the expectation it stands for."""

import math

import pytest
import torch

from kvcompress import EvictingCache
from kvcompress.hf import cache_argument
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.storage.rope import Rope
from tests.contract.models import build, left_padded, places, prompt, tiny
from tests.policies.scene import SCALE, check, scene

ROPE = Rope(inv_freq=torch.tensor([1.0, 0.3, 0.1]), scaling=1.2)


def turned(rotary, x, position):
    """One vector at a position, in float64."""
    if rotary is None:
        return x
    out = x.clone()
    half = len(rotary.inv_freq)
    for pair, frequency in enumerate(rotary.inv_freq.double().tolist()):
        a, b = float(x[pair]), float(x[pair + half])
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[pair] = rotary.scaling * (a * cos - b * sin)
        out[pair + half] = rotary.scaling * (b * cos + a * sin)
    return out


def at_rest(rotary, x, position):
    """Takes back `turned`."""
    if rotary is None:
        return x
    back = Rope(rotary.inv_freq, 1.0)
    out = turned(back, x, -position)
    out[: 2 * len(rotary.inv_freq)] /= rotary.scaling
    return out


def reference(made, policy, rotary, earlier=()):
    """The scores by loops in float64; earlier: queries of forwards before, by (row, query head)."""
    query, keys, values = (x.double() for x in (made.candidates.query, made.candidates.keys, made.candidates.values))
    expected = {}
    for row, head in made.heads():
        attention = {}
        for query_head in range(head * made.group, (head + 1) * made.group):
            raw = [
                at_rest(rotary, query[row, query_head, index], place)
                for index, place in made.queries[row]
                if place >= policy.sinks
            ]
            raw = [*(past[row, query_head] for past in earlier), *raw]
            stacked = torch.stack([x for item in raw for x in (item if item.dim() == 2 else item[None])])
            mean = stacked.mean(0)
            covariance = (stacked - mean).mT @ (stacked - mean) / len(stacked)
            first = int(made.candidates.lengths[row])
            basis = torch.eye(8, dtype=torch.float64)
            rotation = torch.zeros(8, 8, dtype=torch.float64)
            for position in range(first, first + policy.future):
                rotation += torch.stack([turned(rotary, vector, position) for vector in basis], 1) / policy.future
            mean, covariance = rotation @ mean, rotation @ covariance @ rotation.mT
            logits = {}
            for token, _ in made.tokens[row][head]:
                key = keys[row, head, token]
                logits[token] = SCALE * float(mean @ key)
                if policy.covariance:
                    logits[token] += SCALE**2 / 2 * float(key @ covariance @ key)
            others = [token for token, place in made.tokens[row][head] if place >= policy.sinks]
            total = sum(math.exp(logits[token]) for token in others)
            for token in logits:
                share = math.exp(logits[token]) / total if token in others else 0.0
                attention[token] = attention.get(token, 0.0) + share / made.group
        for token, share in attention.items():
            norm = float(values[row, head, token].norm()) if policy.value_norm else 1.0
            expected[row, head, token] = (share + policy.epsilon) * norm
    return expected


# README: | `EvictingCache(policy=ExpectedAttention())` | what future queries should attend to | query statistics |
@pytest.mark.parametrize("rotary", [ROPE, None], ids=["rope", "no_rope"])
@pytest.mark.parametrize(("queries", "padded"), [(1, False), (6, False), (6, True)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"covariance": False}, {"value_norm": False}, {"epsilon": 0.02}],
    ids=lambda settings: next(iter(settings), "default"),
)
def test_scores_are_those_of_the_formula(rotary, queries, padded, settings):
    policy = ExpectedAttention(**{"future": 20, "sinks": 2, **settings})
    made = scene(policy, queries, padded=padded)
    made.candidates.rotary = rotary
    check(made, policy.score(made.candidates), reference(made, policy, rotary))


@pytest.mark.parametrize("padded", [False, True])
def test_queries_of_the_first_tokens_are_left_out_of_the_statistics(padded):
    policy = ExpectedAttention(future=20, sinks=11)
    made = scene(policy, 6, padded=padded)
    made.candidates.rotary = ROPE
    check(made, policy.score(made.candidates), reference(made, policy, ROPE))


def test_statistics_carry_over_from_forward_to_forward():
    policy = ExpectedAttention(future=20, sinks=2)
    made, state, earlier = None, {}, []
    for number, (queries, padded) in enumerate([(6, True), (1, False), (1, False), (5, False)]):
        made = scene(policy, queries, padded=padded, past=9 + 10 * number, seed=number)
        made.candidates.rotary, made.candidates.state = ROPE, state
        check(made, policy.score(made.candidates), reference(made, policy, ROPE, earlier))
        query = made.candidates.query.double()
        earlier.append(
            {
                (row, head): torch.stack([at_rest(ROPE, query[row, head, i], at) for i, at in made.queries[row]])
                for row in range(2)
                for head in range(4)
            }
        )


def test_sinks_alone_get_finite_scores():
    policy = ExpectedAttention(sinks=100)
    made = scene(policy, 3)
    assert policy.score(made.candidates).isfinite().all()


def test_the_logit_is_the_log_of_the_expected_attention():
    # Gaussian queries, drawn at random: log E exp(q.k) = mu.k + k S k / 2
    torch.manual_seed(0)
    policy = ExpectedAttention(sinks=0, value_norm=False, future=1)
    made = scene(policy, 1)
    candidates = made.candidates
    count = 20_000
    candidates.query = torch.randn(2, 4, count, 8) * 0.7 + torch.randn(1, 4, 1, 8)
    candidates.query_positions = torch.arange(count)[None].expand(2, -1).int()
    candidates.lengths = torch.full((2,), count, dtype=torch.int32)
    scores = policy.score(candidates)
    logits = SCALE * candidates.query.unflatten(1, (2, 2)).double() @ candidates.keys.double()[:, :, None].mT
    real = candidates.positions >= 0
    weights = logits.exp().mean(3).masked_fill(~real[:, :, None], 0.0)
    expected = (weights / weights.sum(-1, keepdim=True)).mean(2).float()
    torch.testing.assert_close(scores[real], expected[real], atol=2e-3, rtol=0.05)


@torch.no_grad()
def feed(model, cache, ids, mask, pieces):
    start, logits = 0, []
    for size in pieces:
        stop = start + size
        at = places(mask)[:, start:stop]
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=at, **cache_argument(model, cache))
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt"])
def test_a_row_of_a_padded_batch_is_treated_as_if_alone(family):
    model, policy = tiny(family), ExpectedAttention(sinks=2, future=16)
    rows = [prompt(length, seed=length)[0] for length in (9, 21)]
    ids, mask = left_padded(rows)
    more = prompt(10, batch=2, seed=9)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    pieces = [*[1] * 5, 3, 1, 1]
    together = feed(model, EvictingCache(model, policy=policy, budget=8), ids, mask, [21, *pieces])
    for index, row in enumerate(rows):
        cache = EvictingCache(model, policy=policy, budget=8)
        own = torch.cat([row, more[index]])[None]
        alone = feed(model, cache, own, torch.ones_like(own), [len(row), *pieces])
        torch.testing.assert_close(together[index, 21 - len(row) :], alone[0], atol=5e-5, rtol=1e-4)


def test_statistics_count_as_memory_and_travel_with_the_cache(tmp_path):
    model, ids = tiny("llama"), prompt(20, batch=3)
    policy = ExpectedAttention(sinks=2, future=16)
    cache = EvictingCache(model, policy=policy, budget=8)
    feed(model, cache, ids, torch.ones_like(ids), [20])
    heads, head_dim, layers, batch = 4, 16, 3, 3
    assert cache.memory().by_component["statistics"] == layers * batch * 4 * (heads * (head_dim**2 + head_dim) + 1)
    cache.save(tmp_path / "cache.safetensors")
    loaded = EvictingCache.load(tmp_path / "cache.safetensors", model)
    alone = EvictingCache(model, policy=policy, budget=8)
    feed(model, alone, ids[2:], torch.ones_like(ids[2:]), [20])
    cache.batch_select_indices(torch.tensor([2]))
    loaded.reorder_cache(torch.tensor([2, 1, 0]))
    token = prompt(6, seed=3)

    @torch.no_grad()
    def go_on(cache, rows):
        tokens = token.expand(rows, -1)
        return torch.cat([model(tokens[:, at : at + 1], **cache_argument(model, cache)).logits for at in range(6)], 1)

    expected = go_on(alone, 1)
    torch.testing.assert_close(go_on(cache, 1), expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(go_on(loaded, 3)[:1], expected, atol=5e-5, rtol=1e-4)


def test_a_rope_that_changes_with_the_length_is_refused_by_name():
    model = build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="RoPE of type 'dynamic'"):
        EvictingCache(model, policy=ExpectedAttention(), budget=64)


@pytest.mark.parametrize(
    ("settings", "words"), [({"future": 0}, "future must be"), ({"epsilon": -1.0}, "epsilon must")]
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ExpectedAttention(**settings)
