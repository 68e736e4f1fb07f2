"""Evicting caches with packed slots: what a slot holds, its bytes, and that a neighbour keeps every bit."""

import pytest
import torch

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.kernels.hadamard import rotate
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.knorm import Knorm
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.snapkv import SnapKV
from kvcompress.storage.quantized_slots import BLOCK
from tests.contract.drive import feed
from tests.contract.models import build, left_padded, prompt, tiny

ROWS = [prompt(40, seed=3)[0], prompt(27, seed=4)[0], prompt(5, seed=5)[0]]


def contents(cache, layer=0):
    """Keys, values and positions of a layer's slots, those of a head in the order of their positions."""
    slots = cache.layers[layer].slots
    order = slots.positions.argsort(dim=-1, stable=True)
    keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in slots.contents())
    return keys, values, slots.positions.gather(2, order)


# README: | `H2OCache(packed=GEAR(bits=4))` | heavy hitters + recent, in 4-bit codes |
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("outliers", "hadamard"), [(0.0, False), (0.0, True), (0.2, False), (0.2, True)])
def test_a_packed_cache_holds_what_an_unpacked_one_holds(bits, outliers, hadamard):
    """In the first layer, whose scores depend on nothing that was packed before but the keys themselves."""
    model = tiny()
    coding = GEAR(bits=bits, group_size=8, outliers=outliers, hadamard=hadamard)
    packed = EvictingCache(model, policy=KeyDiff(), budget=20, packed=coding)
    plain = EvictingCache(model, policy=KeyDiff(), budget=20)
    ids, mask = left_padded(ROWS)
    for cache in (packed, plain):
        feed(model, cache, ids, mask)
    keys, values, positions = contents(packed)
    own_keys, own_values, own_positions = contents(plain)
    excess = keys.shape[2] - own_keys.shape[2]
    assert torch.equal(positions[..., excess:], own_positions)
    real = own_positions >= 0
    if hadamard:
        values, own_values = rotate(values), rotate(own_values)
    for found, fed in ((keys, own_keys), (values, own_values)):
        step = (fed[real].amax() - fed[real].amin()) / (2**bits - 1)
        assert (found[:, :, excess:][real] - fed[real]).abs().max() < 0.51 * step


def test_a_step_writes_one_slot_and_no_bit_beside_it():
    model = tiny()
    for bits in (2, 3, 4, 8):
        cache = H2OCache(model, budget=20, packed=GEAR(bits=bits, group_size=8, outliers=0.1))
        feed(model, cache, prompt(40, 2))
        for step in range(30):
            slots = cache.layers[0].slots
            before, spare = [x.clone() for x in slots.contents()], slots.spare.clone()
            feed(model, cache, prompt(1, 2, seed=step))
            written = torch.zeros_like(slots.positions, dtype=torch.bool).scatter_(2, spare[..., None], True)
            for was, now in zip(before, slots.contents(), strict=True):
                assert torch.equal(was[~written], now[~written])
                assert (was[written] != now[written]).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_the_formula(bits):
    model = tiny()
    cache = H2OCache(model, budget=100, packed=GEAR(bits=bits, group_size=8, outliers=0.1))
    feed(model, cache, prompt(150, 3))
    slots = -(-101 // BLOCK) * BLOCK
    # codes, scale and zero of two groups of 8, one outlier a side; position and score
    a_slot = 2 * (16 * bits // 8 + 2 * 4 + 2 * 3) + 8
    # and of each head centre and spread of 16 channels of its keys, and the spare slot
    a_layer = 3 * 2 * (slots * a_slot + 2 * 2 * 16 + 8)
    counters = 3 * 3 * 4 + 8
    assert cache.memory().total_bytes == 3 * (a_layer + counters)
    plain = H2OCache(model, budget=100)
    feed(model, plain, prompt(150, 3))
    assert cache.memory().total_bytes < plain.memory().total_bytes * 0.65


def test_eight_bits_choose_and_answer_as_full_precision():
    model = tiny("llama", initializer_range=0.05)
    packed, plain = H2OCache(model, budget=20, packed=GEAR(bits=8, group_size=8)), H2OCache(model, budget=20)
    for tokens, seed in ((40, 1), *((1, seed) for seed in range(10)), (7, 20)):
        logits, expected = (feed(model, cache, prompt(tokens, 2, seed=seed)) for cache in (packed, plain))
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_what_does_not_go_together_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="slots are packed a token at a time.*got 4 and 2"):
        H2OCache(model, budget=20, packed=GEAR(rank=4, rank_decode=2))
    with pytest.raises(ValueError, match="rerotated stores keys without rotation"):
        EvictingCache(model, policy=H2O(), budget=20, rerotated=True, packed=GEAR())


def test_the_scores_of_a_head_add_up_to_its_queries():
    """Each of the group's queries gives out 1, the token's attention to itself counted in."""
    model = tiny()
    cache = H2OCache(model, budget=60, packed=GEAR(bits=4, group_size=8))
    feed(model, cache, prompt(20, 2))
    for step in range(10):
        feed(model, cache, prompt(1, 2, seed=step))
    for layer in cache.layers:
        torch.testing.assert_close(layer.slots.scores.sum(-1), torch.full((2, 2), 2.0 * 30))


def test_scores_that_never_change_are_not_read_off_the_codes():
    """Found by tests/fuzz: the norms of decoded keys took the place of those of the keys as they came."""
    cache = EvictingCache(tiny(), policy=Knorm(recent=1), budget=12, packed=GEAR(bits=2, group_size=8))
    feed(tiny(), cache, prompt(20))
    slots = [layer.slots for layer in cache.layers]
    before = [(layer.positions.clone(), layer.scores.clone()) for layer in slots]
    feed(tiny(), cache, prompt(4, seed=2))
    for layer, (positions, scores) in zip(slots, before, strict=True):
        same = (layer.positions == positions) & (positions >= 0)
        assert same.any()
        assert torch.equal(layer.scores[same], scores[same])


def biased(bias):
    """A model whose keys have a bias as Qwen2's: large, in both channels of the pair that RoPE turns most slowly."""
    rope = {"rope_type": "default", "rope_theta": 1e7}
    model = build("qwen2", initializer_range=0.15, rope_parameters=rope)
    for layer in model.model.layers:
        by_head = layer.self_attn.k_proj.bias.detach().view(model.config.num_key_value_heads, -1)
        by_head.zero_()
        by_head[:, by_head.shape[1] // 2 - 1], by_head[:, -1] = bias, -0.6 * bias
    return model


def divergence(model, make, fed=(50,)):
    """Mean KL of 8 steps from those of the full cache, behind a prompt that comes in these pieces."""
    ids, outs = prompt(sum(fed) + 8, 4), []
    for cache in (DenseCache(model), make(model)):
        pieces = ids.split([*fed, *[1] * 8], 1)
        outs.append(torch.cat([feed(model, cache, piece)[:, -1:] for piece in pieces][len(fed) :], 1).log_softmax(-1))
    full, found = outs
    return (full.exp() * (full - found)).sum(-1).mean().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fed", [(50,), (5, 45), (1, 49)], ids=str)
def test_a_bias_of_the_keys_does_not_drown_them(bits, fed):
    def make(model):
        return H2OCache(model, budget=80, packed=GEAR(bits=bits))

    plain = divergence(biased(0), make, fed)
    assert plain > 0
    for bias in (20, 100):
        assert divergence(biased(bias), make, fed) < 2 * plain


@pytest.mark.parametrize(
    "policy", [SnapKV(window=3, recent=3, kernel=3), KeyDiff(), KVzip(sinks=1, chunk=7, prompt=(5, 6))]
)
def test_nor_does_it_for_any_policy(policy):
    def make(model):
        return EvictingCache(model, policy=policy, budget=80, packed=GEAR(bits=4))

    assert divergence(biased(100), make) < 2 * divergence(biased(0), make)


def test_centre_and_spread_are_learned_from_a_rows_own_first_tokens_and_kept():
    model = biased(100)
    ids, mask = left_padded(ROWS)
    # the last row is fed nothing but padding first
    mask[2] = 0
    cache = H2OCache(model, budget=60, packed=GEAR(bits=8))
    feed(model, cache, ids, mask)
    (first, *_), slots = cache.layers, [layer.slots for layer in cache.layers]
    assert first.slots.centre[:2, :, 7].sub(100).abs().max() < 10
    assert (first.slots.centre[2] == 0).all()
    assert (first.slots.spread[2] == 1).all()
    for row in range(2):
        alone = H2OCache(model, budget=60, packed=GEAR(bits=8))
        feed(model, alone, ROWS[row][None])
        for name in ("centre", "spread"):
            for layer, own in zip(slots, alone.layers, strict=True):
                torch.testing.assert_close(getattr(layer, name)[row], getattr(own.slots, name)[0], rtol=1e-2, atol=1e-2)
    centre, spread = first.slots.centre.clone(), first.slots.spread.clone()
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    feed(model, cache, prompt(1, 3, seed=8), mask)
    assert torch.equal(first.slots.centre[:2], centre[:2])
    assert torch.equal(first.slots.spread[:2], spread[:2])
    assert first.slots.centre[2, :, 7].sub(100).abs().max() < 10


def test_a_centre_stays_within_a_bound_of_the_logits():
    """Gemma 2's bound is of the whole logit: the centre's share must meet it too."""
    model = build("gemma2", initializer_range=0.1, attn_logit_softcapping=5.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(layer.self_attn.k_proj.out_features))
            layer.self_attn.k_proj.bias.view(model.config.num_key_value_heads, -1)[:, [-1]] = 30.0
    cache, full = H2OCache(model, budget=80, packed=GEAR(bits=8)), DenseCache(model)
    for piece in (prompt(40, 2), prompt(5, 2, seed=2), prompt(1, 2, seed=3)):
        found, expected = (feed(model, each, piece) for each in (cache, full))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert cache.layers[1].slots.centre.abs().max() > 20
