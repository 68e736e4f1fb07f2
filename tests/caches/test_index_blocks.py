"""Indexers that score blocks of the tokens a query may see, beside keys and values of many heads (Qwen4)."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvcompress import (
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    KVzip,
    ShadowKVCache,
    SnapKV,
    release,
)
from kvcompress.check.check import check
from kvcompress.hf import cache_argument, indexer
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.gear import GEAR
from tests.caches.test_indexers import assert_close, exact
from tests.contract.drive import feed, full, generate
from tests.contract.models import DEVICE, left_padded, prompt

KV_HEADS, HEAD_DIM, INDEX, BUDGET, BLOCK = 2, 16, 24, 12, 4
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 95,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": INDEX,
    "indexer_budget": BUDGET,
    "indexer_compress_ratio": BLOCK,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
    # the first layer keeps the last tokens' ids among its states
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
}
ALL_ATTEND = {"num_hidden_layers": 2, "layer_types": ["indexed_attention"] * 2, "ple_layer_ids": None}
ROOMY = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=1000),
    "adakv": lambda model: EvictingCache(model, policy=SnapKV(), budget=1000, allocation="heads"),
    "gear": exact,
}


def skip_before_5_24():
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("indexers are served from transformers 5.24 on")


def build(**changes):
    skip_before_5_24()
    config = AutoConfig.for_model("qwen4_exp_text", **SIZES | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    return model.to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def batch():
    rows = [prompt(40)[0] % 90 + 1, prompt(27, seed=2)[0] % 90 + 1]
    return left_padded(rows)


def of_axes(mask, tokens):
    """Positions as those of a model that sees images, [4, batch, tokens]: along the text, and along three axes."""
    place = mask.cumsum(-1) - 1
    return torch.stack([place, place // 3, place // 3 + place % 3, place // 3 + place % 2])[..., -tokens:]


@pytest.mark.parametrize("kind", ROOMY)
def test_turns_and_files_go_on_as_one(kind, model, batch, tmp_path):
    """With positions of several axes, which index keys are rotated by."""
    make, (ids, mask) = ROOMY[kind], batch
    own, theirs = make(model), DynamicCache(config=model.config)
    for first, last in ((0, 25), (25, 26), (26, 27), (27, 40)):
        at = of_axes(mask[:, :last], last - first)
        said, wanted = (feed(model, cache, ids[:, first:last], mask[:, :last], at) for cache in (own, theirs))
        there = mask[:, first:last].bool()
        assert_close(said[there], wanted[there])
        own.save(tmp_path / "cache.safetensors")
        own = type(own).load(tmp_path / "cache.safetensors", model)
    more, rows = ids[:, -3:], torch.tensor([1, 0], device=DEVICE)
    twin = own.clone()
    # which states in transformers' own cache know nothing of
    theirs.reorder_cache(rows)
    for cache in (own, twin):
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2], device=DEVICE))
    longer = torch.cat([mask[rows], torch.ones_like(more)], 1)
    at = of_axes(longer, 3)
    wanted = feed(model, theirs, more, longer, at)
    for cache in (own, twin):
        assert_close(feed(model, cache, more, longer, at), wanted)
    own.reset()
    again = feed(model, own, ids, mask)
    assert_close(again[mask.bool()], feed(model, DynamicCache(config=model.config), ids, mask)[mask.bool()])


def test_an_evicting_cache_is_a_model_that_sees_what_it_keeps(model):
    """Its heads keep different tokens, and blocks are made of those of each."""
    outcomes = {row.cache: (row.outcome, row.reason) for row in check(build(), ("adakv",))}
    assert {outcome for outcome, _ in outcomes.values()} == {"OK"}, outcomes


@pytest.mark.parametrize("make", [ROOMY["dense"], ROOMY["h2o"]], ids=["dense", "h2o"])
def test_it_generates_as_with_transformers_own_cache(model, batch, make):
    ids, mask = batch
    settings = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(generate(model, make(model), ids, mask, **settings), full(model, ids, mask, **settings))
    assert torch.equal(generate(model, make(model), ids, mask, prefill_chunk_size=16), full(model, ids, mask))


def test_selection_bites_and_other_caches_choose_as_ever(batch):
    model, (ids, mask) = build(), batch
    wanted, shown = feed(model, DynamicCache(config=model.config), ids, mask), mask.bool()
    everything = build(indexer_budget=400)
    assert not torch.allclose(
        feed(everything, DynamicCache(config=model.config), ids, mask)[shown], wanted[shown], atol=1e-3
    )
    feed(model, DenseCache(model), ids, mask)
    assert torch.equal(feed(model, DynamicCache(config=model.config), ids, mask), wanted)
    release(model)
    assert "forward" not in vars(model.model.layers[1].self_attn.indexer)
    assert torch.equal(feed(model, DynamicCache(config=model.config), ids, mask), wanted)


@pytest.mark.parametrize("make", [DenseCache, lambda model: H2OCache(model, budget=24)], ids=["dense", "h2o"])
def test_long_prompts_are_scored_some_queries_at_a_time(model, batch, make, monkeypatch):
    ids, mask = batch
    wanted = feed(model, make(model), ids, mask)
    monkeypatch.setattr(indexer, "_MOST", 1)
    assert_close(feed(model, make(model), ids, mask)[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("make", [DenseCache, exact], ids=["dense", "gear"])
def test_tokens_are_taken_back_and_a_refused_forward_leaves_no_positions(make):
    model, ids = build(**ALL_ATTEND), prompt(40, 2) % 90 + 1
    cache, other = make(model), make(model)
    feed(model, cache, ids[:, :30])
    feed(model, cache, ids[:, 5:15])
    cache.crop(-10)
    with pytest.raises(ValueError, match="attention_mask"):
        feed(model, cache, ids[:, 30:], torch.ones(2, 99, dtype=torch.long, device=DEVICE))
    feed(model, other, ids[:, :30])
    assert_close(feed(model, cache, ids[:, 30:]), feed(model, other, ids[:, 30:]))
    assert cache.padding.axes.shape == (2, 40, 3)


@pytest.mark.parametrize("kind", ROOMY)
def test_what_a_later_mask_hides_is_in_no_block(kind):
    """Of one layer, whose keys know of no other token."""
    model, ids = (
        build(num_hidden_layers=1, layer_types=["indexed_attention"], ple_layer_ids=None),
        prompt(40, 2) % 90 + 1,
    )
    places = torch.arange(40, device=DEVICE).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 20:23] = 0
    cache = ROOMY[kind](model)
    feed(model, cache, ids[:, :30])
    said = feed(model, cache, ids[:, 30:], mask, places[:, 30:])
    assert_close(said, model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 30:])


def test_a_full_cache_is_packed_with_its_index_keys():
    model, ids = build(**ALL_ATTEND), prompt(60, 2) % 90 + 1
    theirs, fed = DynamicCache(config=model.config), GEARCache(model, bits=8)
    feed(model, theirs, ids[:, :59])
    feed(model, fed, ids[:, :59])
    filled = GEARCache(model, bits=8).fill(theirs)
    assert_close(feed(model, filled, ids[:, 59:]), feed(model, fed, ids[:, 59:]))


def test_index_keys_are_counted(model):
    ids = prompt(256, 2) % 90 + 1
    tokens = 2 * 2 * 256
    dense, evicting, packed = DenseCache(model), H2OCache(model, budget=64), GEARCache(model, bits=4)
    for cache in (dense, evicting, packed):
        feed(model, cache, ids)
        states = cache.memory().by_component["states"]
        assert cache.memory().full_bytes == 4 * tokens * (2 * KV_HEADS * HEAD_DIM + INDEX) + states
        # positions of all columns, once
        assert cache.memory().by_component["padding"] == 2 * 256 * 3 * 4
    assert dense.memory().by_component["keys"] == 4 * tokens * KV_HEADS * HEAD_DIM
    # with a byte that says whether it is padding
    of_index = tokens * (4 * INDEX + 1)
    assert dense.memory().by_component["index"] == packed.memory().by_component["index"] == of_index
    # each head holds those of its own tokens
    assert evicting.memory().by_component["keys"] == 2 * 2 * 65 * 4 * KV_HEADS * (HEAD_DIM + INDEX)


REFUSED = {
    "shadowkv": (lambda model: ShadowKVCache(model, budget=64), "ShadowKVCache does not hold its keys"),
    "kvzip": (lambda model: EvictingCache(model, policy=KVzip(), budget=99), "KVzip, which reads tokens twice"),
    "expected_attention": (
        lambda model: EvictingCache(model, policy=ExpectedAttention(), budget=99),
        "ExpectedAttention, which undoes rotations, cannot",
    ),
    "packed": (
        lambda model: H2OCache(model, budget=99, packed=GEAR(bits=4, group_size=8)),
        "packed cannot be combined",
    ),
    "rerotated": (lambda model: H2OCache(model, budget=99, rerotated=True), "rerotated cannot be combined"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_hold_index_keys_says_so(model, make, reason):
    with pytest.raises(ValueError, match=f"Qwen4ExpForCausalLM chooses what tokens attend to by an indexer.*{reason}"):
        make(model)


def test_a_mask_of_all_queries_and_tokens_is_refused(model):
    ids, cache = prompt(6) % 90 + 1, DenseCache(model)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=DEVICE).tril()
    with pytest.raises(ValueError, match=r"padding mask \[batch, tokens seen\] .*got a mask of shape \[1, 1, 6, 6\]"):
        model(ids, attention_mask={"indexed_attention": mask, "linear_attention": None}, **cache_argument(model, cache))
