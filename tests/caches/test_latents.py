"""Multi-head latent attention: latents are stored and attended to as they are, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvcompress import (
    AttentionMatchingCache,
    DenseCache,
    EvictingCache,
    ExpectedAttention,
    GEARCache,
    H2OCache,
    HydragenCache,
    KIVICache,
    KVzip,
    PrefixStore,
    ShadowKVCache,
    SnapKV,
    release,
)
from kvcompress.check.check import check
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from kvcompress.storage.latent import DenseLatents
from tests.contract.drive import feed, full, generate
from tests.contract.models import DEVICE, left_padded, prompt

RANK, SHARED = 56, 8
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "q_lora_rank": 24,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": SHARED,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
TYPES = {
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "minicpm3": {},
    "youtu": {},
}


def build(name="deepseek_v3", dtype=torch.float32, **changes):
    try:
        config = AutoConfig.for_model(name, **{**SIZES, **TYPES[name], **changes})
    except ValueError as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def batch():
    return left_padded([prompt(40)[0], prompt(27, seed=2)[0]])


def assert_close(said, wanted):
    torch.testing.assert_close(said, wanted, rtol=0.0, atol=2e-4 * float(wanted.abs().max()))


ROOMY = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=1000),
    "snapkv": lambda model: EvictingCache(model, policy=SnapKV(), budget=1000),
    "adakv": lambda model: EvictingCache(model, policy=SnapKV(), budget=1000, allocation="heads"),
    "pinned": lambda model: H2OCache(model, budget=1000, pin=[(0, 4)]),
}
NAMES = ("none", "h2o", "snapkv", "gear", "gear:bits=2", "kivi")


# the promises of `kvcompress check`: rows, padding, single tokens, turns, what is kept, bytes, files, generation
@pytest.mark.parametrize("name", TYPES)
def test_every_promise_is_kept(name):
    outcomes = {row.cache: (row.outcome, row.reason) for row in check(build(name), NAMES)}
    assert {outcome for outcome, _ in outcomes.values()} == {"OK"}, outcomes


@pytest.mark.parametrize("make", ROOMY.values(), ids=ROOMY)
def test_what_is_kept_whole_equals_transformers_own_cache(model, batch, make):
    ids, mask = batch
    wanted = full(model, ids, mask)
    assert torch.equal(generate(model, make(model), ids, mask), wanted)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, make(model), ids, mask, **beams), full(model, ids, mask, **beams))
    assert torch.equal(generate(model, make(model), ids, mask, prefill_chunk_size=7), wanted)


@pytest.mark.parametrize("make", ROOMY.values(), ids=ROOMY)
def test_turns_copies_and_files_go_on_as_one(model, batch, make, tmp_path):
    ids, mask = batch
    own, theirs = make(model), DynamicCache(config=model.config)
    for first, last in ((0, 25), (25, 26), (26, 40)):
        seen = mask[:, :last]
        said, wanted = (feed(model, cache, ids[:, first:last], seen) for cache in (own, theirs))
        there = mask[:, first:last].bool()
        assert_close(said[there], wanted[there])
        twin = own.clone()
        own.save(tmp_path / "cache.safetensors")
        own = type(own).load(tmp_path / "cache.safetensors", model)
        assert own.memory().full_bytes == twin.memory().full_bytes
    more = prompt(3, 2, seed=5)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    wanted = feed(model, theirs, more, longer)
    for cache in (own, twin):
        assert_close(feed(model, cache, more, longer), wanted)
    rows = torch.tensor([1, 0], device=DEVICE)
    own.reorder_cache(rows)
    theirs.reorder_cache(rows)
    longer = torch.cat([longer[rows], torch.ones_like(more)], 1)
    assert_close(feed(model, own, more, longer), feed(model, theirs, more, longer))


def test_tokens_are_taken_back(model):
    ids = prompt(30, 2)
    cache = DenseCache(model)
    feed(model, cache, ids)
    cache.crop(-10)
    other = DenseCache(model)
    feed(model, other, ids[:, :20])
    assert_close(feed(model, cache, ids[:, 20:]), feed(model, other, ids[:, 20:]))


def test_only_latents_are_held(model):
    """As many bytes as transformers' own cache, and fewer where tokens are evicted or packed."""
    ids = prompt(256, 2)
    theirs = DynamicCache(config=model.config)
    feed(model, theirs, ids)
    wanted = sum(tensor.nbytes for layer in theirs.layers for tensor in (layer.keys, layer.values))
    assert wanted == 3 * 2 * 256 * (RANK + SHARED) * 4
    dense, evicting, packed = DenseCache(model), H2OCache(model, budget=64), GEARCache(model, bits=4)
    for cache in (dense, evicting, packed):
        feed(model, cache, ids)
        assert cache.memory().full_bytes == wanted
    assert dense.memory().by_component == {"keys": wanted, "visible": 3 * 2 * 256}
    assert evicting.memory().ratio < 0.3
    assert packed.memory().ratio < 0.25
    assert all(kept.shape == (2, 1) for cache in (dense, evicting, packed) for kept in cache.memory().tokens_kept)


@pytest.mark.parametrize("make", [DenseCache, ROOMY["h2o"], ROOMY["adakv"]], ids=["dense", "h2o", "adakv"])
def test_a_file_holds_latents_once(model, make, tmp_path):
    cache = make(model)
    feed(model, cache, prompt(200, 2))
    cache.save(tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        names = [*file.keys()]
    assert [name for name in names if "keys" in name]
    assert not [name for name in names if "values" in name]


def test_latents_are_put_in_another_order_once():
    both = torch.arange(2 * 5 * 3.0).view(2, 1, 5, 3)
    segment = DenseLatents(both, both[..., :2])
    segment.append(both, both[..., :2], None)
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    segment.reorder(order)
    wanted = torch.cat([both[torch.arange(2)[:, None], 0, order], both[:, 0, 3:]], 1)[:, None]
    keys, values, _ = segment.held()
    assert torch.equal(keys, wanted)
    assert torch.equal(values, wanted[..., :2])


@pytest.mark.parametrize("allocation", ["uniform", "heads", "pyramid"])
def test_a_padded_row_keeps_what_it_keeps_alone(model, batch, allocation):
    caches = []
    for ids, mask in (batch, (batch[0][1:, 13:], batch[1][1:, 13:])):
        cache = EvictingCache(model, policy=SnapKV(window=4, recent=4), budget=16, allocation=allocation)
        feed(model, cache, ids, mask)
        caches.append(cache)
    for both, alone in zip(*(cache.layers for cache in caches), strict=True):
        ours, wanted = (x[-1].flatten().tolist() for x in (both.held_positions(), alone.held_positions()))
        assert {place for place in ours if place >= 0} == {place for place in wanted if place >= 0}
        assert len({place for place in ours if place >= 0}) < 27


def test_gear_packs_what_a_full_cache_holds(model):
    ids = prompt(100, 2)
    theirs = DynamicCache(config=model.config)
    feed(model, theirs, ids)
    fed, filled = GEARCache(model, bits=4, tail_bits=None), GEARCache(model, bits=4, tail_bits=None).fill(theirs)
    feed(model, fed, ids)
    more = prompt(1, 2, seed=4)
    assert_close(feed(model, filled, more), feed(model, fed, more))


def test_half_precision_stays_near(batch):
    model = build(dtype=torch.bfloat16, initializer_range=0.1)
    ids, mask = batch
    wanted = feed(model, DynamicCache(config=model.config), ids, mask)
    for make in (DenseCache, ROOMY["h2o"]):
        said = feed(model, make(model), ids, mask)
        assert float((said - wanted)[mask.bool()].abs().max()) < 0.08 * float(wanted.abs().max())


class _Wrapped(nn.Module):
    """A projection whose weight cannot be read."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_projection_of_another_kind_is_asked_what_it_does(batch):
    model, (ids, mask) = build(), batch
    wanted = full(model, ids, mask)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = _Wrapped(layer.self_attn.kv_b_proj)
    assert torch.equal(generate(model, DenseCache(model), ids, mask), wanted)


def test_a_model_is_released_copied_and_pickled():
    model, ids = build(), prompt(20)
    attention = model.model.layers[0].self_attn
    wanted = feed(model, DenseCache(model), ids)
    assert "expand_kv" in vars(attention)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(feed(other, DenseCache(other), ids), wanted)
        assert vars(other.model.layers[0].self_attn)["expand_kv"].model is other.model.layers[0].self_attn
    # other caches and none go on as ever
    assert_close(feed(model, DynamicCache(config=model.config), ids), wanted)
    assert_close(model(ids, use_cache=False).logits, wanted)
    release(model)
    assert "expand_kv" not in vars(attention)
    assert_close(model(ids, **cache_argument(model, DynamicCache(config=model.config))).logits, wanted)


REFUSED = {
    "shadowkv": (lambda model: ShadowKVCache(model, budget=64), "ShadowKVCache does not hold them"),
    "hydragen": (HydragenCache, "HydragenCache does not hold them"),
    "store": (PrefixStore, "latent attention"),
    "kvzip": (lambda model: EvictingCache(model, policy=KVzip(), budget=9), "KVzip, which reads tokens twice"),
    "matching": (lambda model: AttentionMatchingCache(model, budget=0.5), "AttentionMatching"),
    "critical": (
        lambda model: EvictingCache(model, policy=SnapKV(second_stage=0.5), budget=64),
        "SnapKV, which weighs values",
    ),
    "expected": (lambda model: EvictingCache(model, policy=ExpectedAttention(), budget=9), "undoes rotations"),
    "packed": (lambda model: H2OCache(model, budget=9, packed=GEAR(rank=0)), "packed"),
    "rerotated": (lambda model: H2OCache(model, budget=9, rerotated=True), "rerotated"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_hold_latents_says_so(model, make, reason):
    with pytest.raises(ValueError, match=reason):
        make(model)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_more_bits_lose_less(model, bits):
    ids, more = prompt(448, 2), prompt(4, 2, seed=4)
    exact, packed = DenseCache(model), KIVICache(model, bits=bits, buffer=64, group_size=16)
    losses = []
    for cache in (exact, packed):
        feed(model, cache, ids)
        losses.append(feed(model, cache, more).log_softmax(-1))
    lost = float((losses[0].exp() * (losses[0] - losses[1])).sum(-1).mean())
    assert 0 < lost < {2: 2.0, 4: 0.25, 8: 2e-3}[bits]
    assert packed.memory().ratio < {2: 0.3, 4: 0.36, 8: 0.5}[bits]
