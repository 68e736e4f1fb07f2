"""DeepSeek Sparse Attention: caches hold what an indexer scores, and tokens attend to what it chooses of those held."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvcompress import (
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzip,
    ShadowKVCache,
    SnapKV,
    release,
)
from kvcompress.check.check import check
from kvcompress.hf import cache_argument, check_served, indexer
from kvcompress.hf.small import random_model
from kvcompress.kernels import sparse_attention
from tests.caches.test_latents import RANK, SHARED
from tests.caches.test_latents import SIZES as LATENT_SIZES
from tests.contract.drive import feed, full, generate
from tests.contract.models import DEVICE, left_padded, prompt

INDEX, CHOSEN = 16, 12
SIZES = {
    **LATENT_SIZES,
    "head_dim": SHARED,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": CHOSEN,
    "index_head_dim": INDEX,
    # with few, many tokens would score 0, and none of them before another
    "index_n_heads": 24,
}
SHARING = {"indexer_types": ["full", "shared", "full"]}
TYPES = {
    "deepseek_v32": {},
    "axk2": {},
    # the second layer takes what the first chose
    "glm_moe_dsa": SHARING,
    # and with sink logits
    "hy_v4": SHARING,
    # the second layer has latents of another width, and a window
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "sliding_window": 16,
        "head_dim": 24,
        "per_layer_config": {1: {"kv_lora_rank": 40, "qk_nope_head_dim": 16}},
    },
}


def build(name="deepseek_v32", dtype=torch.float32, **changes):
    try:
        config = AutoConfig.for_model(name, **{**SIZES, **TYPES[name], **changes})
    except ValueError as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    if "indexed_attention" not in config.layer_types:
        pytest.skip("this transformers gives caches keys and values made of latents")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # the pad is a word too: scores of a token that is all 0 say nothing
        words = model.get_input_embeddings().weight
        words[0] = words[1:].mean(0)
    return model.to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def batch():
    return left_padded([prompt(40)[0], prompt(27, seed=2)[0]])


def assert_close(said, wanted):
    torch.testing.assert_close(said, wanted, rtol=0.0, atol=2e-4 * float(wanted.abs().max()))


def exact(model):
    """GEAR whose tail is exact, and longer than the prompts."""
    return GEARCache(model, tail_bits=None)


ROOMY = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=1000),
    "adakv": lambda model: EvictingCache(model, policy=SnapKV(), budget=1000, allocation="heads"),
    "gear": exact,
}
roomy = pytest.mark.parametrize("make", ROOMY.values(), ids=ROOMY)
# the promises of `kvcompress check`, where an evicting cache is compared to a model that sees only what it has kept
PROMISES = {"deepseek_v32": ("h2o", "gear"), "hy_v4": ("snapkv",), "dots3_note_text": ("keydiff",)}


@pytest.mark.parametrize("name", PROMISES)
def test_every_promise_is_kept(name):
    outcomes = {row.cache: (row.outcome, row.reason) for row in check(build(name), PROMISES[name])}
    assert {outcome for outcome, _ in outcomes.values()} == {"OK"}, outcomes


@pytest.mark.parametrize(
    ("name", "kind"),
    [("deepseek_v32", kind) for kind in ROOMY] + [(name, kind) for name in [*TYPES][1:] for kind in ("dense", "h2o")],
)
def test_turns_and_files_go_on_as_one(name, kind, batch, tmp_path):
    model, make, (ids, mask) = build(name), ROOMY[kind], batch
    own, theirs = make(model), DynamicCache(config=model.config)
    for first, last in ((0, 25), (25, 26), (26, 40)):
        said, wanted = (feed(model, cache, ids[:, first:last], mask[:, :last]) for cache in (own, theirs))
        there = mask[:, first:last].bool()
        assert_close(said[there], wanted[there])
        own.save(tmp_path / "cache.safetensors")
        own = type(own).load(tmp_path / "cache.safetensors", model)
    more, rows = prompt(3, 2, seed=5), torch.tensor([1, 0], device=DEVICE)
    twin = own.clone()
    for cache in (own, twin, theirs):
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2], device=DEVICE))
    longer = torch.cat([mask[rows], torch.ones_like(more)], 1)
    wanted = feed(model, theirs, more, longer)
    for cache in (own, twin):
        assert_close(feed(model, cache, more, longer), wanted)
    own.reset()
    assert_close(feed(model, own, ids, mask)[mask.bool()], full_logits(model, ids, mask)[mask.bool()])


def full_logits(model, ids, mask):
    return feed(model, DynamicCache(config=model.config), ids, mask)


@pytest.mark.parametrize("make", [ROOMY["dense"], ROOMY["h2o"]], ids=["dense", "h2o"])
def test_it_generates_as_with_transformers_own_cache(model, batch, make):
    ids, mask = batch
    wanted = full(model, ids, mask)
    assert torch.equal(generate(model, make(model), ids, mask), wanted)
    assert torch.equal(generate(model, make(model), ids, mask, prefill_chunk_size=7), wanted)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, make(model), ids, mask, **beams), full(model, ids, mask, **beams))


@pytest.mark.parametrize("make", [DenseCache, exact], ids=["dense", "gear"])
def test_tokens_are_taken_back(model, make):
    ids = prompt(40, 2)
    cache, other = make(model), make(model)
    feed(model, cache, ids[:, :30])
    feed(model, cache, prompt(10, 2, seed=8))
    cache.crop(-10)
    feed(model, other, ids[:, :30])
    assert_close(feed(model, cache, ids[:, 30:]), feed(model, other, ids[:, 30:]))


@roomy
def test_what_a_later_mask_hides_is_not_chosen(make):
    """Of one layer, whose keys know of no other token."""
    model, ids = build(num_hidden_layers=1), prompt(40, 2)
    places = torch.arange(40, device=DEVICE).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 20:24] = 0
    cache = make(model)
    feed(model, cache, ids[:, :30])
    said = feed(model, cache, ids[:, 30:], mask, places[:, 30:])
    assert_close(said, model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 30:])


@pytest.fixture(scope="module")
def pooling():
    """A hybrid whose indexers score pools of four tokens; one of its layers takes what the one before it chose."""
    text = {name: size for name, size in SIZES.items() if name not in ("qk_rope_head_dim", "head_dim")} | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] + ["full_attention"] * 3,
        "indexer_types": ["full", "full", "shared", "full"],
        "index_kpool": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "projection_intermediate_size": 32,
        "num_heads": 2,
        "depth": 1,
        "out_hidden_size": 64,
    }
    try:
        config = AutoConfig.for_model("glm5_next", text_config=text, vision_config=tower)
    except ValueError as error:
        pytest.skip(f"this transformers has no GLM-5-Next: {error}")
    if "indexed_attention" not in config.get_text_config(decoder=True).layer_types:
        pytest.skip("this transformers gives caches keys and values made of latents")
    return random_model(config).to(DEVICE)


@pytest.mark.parametrize("make", [DenseCache, exact], ids=["dense", "gear"])
def test_pools_are_chosen_as_in_transformers_own_cache(pooling, batch, make, tmp_path):
    ids, mask = batch
    own, theirs = make(pooling), DynamicCache(config=pooling.config)
    # single tokens fill a pool, and begin another
    for first, last in ((0, 25), (25, 26), (26, 27), (27, 28), (28, 29), (29, 30), (30, 40)):
        said, wanted = (feed(pooling, cache, ids[:, first:last], mask[:, :last]) for cache in (own, theirs))
        there = mask[:, first:last].bool()
        assert_close(said[there], wanted[there])
        own.save(tmp_path / "cache.safetensors")
        own = type(own).load(tmp_path / "cache.safetensors", pooling)
    everything = copy.deepcopy(pooling)
    for layer in everything.model.language_model.layers[1:]:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_topk = 1000
    wider = feed(everything, DynamicCache(config=pooling.config), ids, mask)
    assert not torch.allclose(wider[:, -1], wanted[:, -1], atol=1e-2)
    with pytest.raises(ValueError, match="pools of 4 neighbouring tokens, which eviction takes apart; H2OCache"):
        H2OCache(pooling, budget=64)


def test_selection_bites_and_is_put_off(model, batch, monkeypatch):
    """Fewer tokens attend as they ever did, without scores; the masks of all pairs are never made."""
    ids, mask = batch
    everything = build(index_topk=1000)
    assert not torch.allclose(full_logits(everything, ids, mask), full_logits(model, ids, mask), atol=0.1)
    calls, masks = [], []
    plain = sparse_attention.sparse_attention
    for name in ("kvcompress.layer", "kvcompress.caches.dense"):
        monkeypatch.setattr(f"{name}.sparse_attention", lambda *args: calls.append(args) or plain(*args))
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    cache = DenseCache(model)
    feed(model, cache, ids[:, :CHOSEN], mask[:, :CHOSEN])
    assert not calls
    feed(model, cache, ids[:, CHOSEN:], mask)
    model(ids[:, :5], **cache_argument(model, DenseCache(model)))
    hook.remove()
    assert len(calls) == 3
    assert [each.shape for each in masks] == [(2, 1, 1, CHOSEN), (2, 1, 1, 40), (2, 1, 1, 0)]


def test_only_what_is_chosen_receives_attention(model):
    """Each query gives an attention of one for each head, in chunks and steps."""
    cache = H2OCache(model, budget=1000)
    ids = prompt(41, 2)
    for first, last in ((0, 25), (25, 40), (40, 41)):
        feed(model, cache, ids[:, first:last])
        for layer in cache.layers:
            given = layer.slots.scores.masked_fill(layer.slots.positions < 0, 0.0).sum(-1)
            torch.testing.assert_close(given, torch.full_like(given, 4.0 * last))


@pytest.mark.parametrize("make", [DenseCache, lambda model: H2OCache(model, budget=24)], ids=["dense", "h2o"])
def test_long_prompts_are_scored_some_queries_at_a_time(model, batch, make, monkeypatch):
    ids, mask = batch
    wanted = feed(model, make(model), ids, mask)
    monkeypatch.setattr(indexer, "_MOST", 1)
    assert_close(feed(model, make(model), ids, mask)[mask.bool()], wanted[mask.bool()])


def test_index_keys_are_counted(model):
    ids = prompt(256, 2)
    theirs = DynamicCache(config=model.config)
    feed(model, theirs, ids)
    held = [tensor for layer in theirs.layers for tensor in (layer.keys, layer.values, layer.indexer_keys)]
    wanted = sum(tensor.nbytes for tensor in held)
    assert wanted == 3 * 2 * 256 * (RANK + SHARED + INDEX) * 4
    dense, evicting, packed = DenseCache(model), H2OCache(model, budget=64), GEARCache(model, bits=4)
    for cache in (dense, evicting, packed):
        feed(model, cache, ids)
        assert cache.memory().full_bytes == wanted
    assert dense.memory().by_component["keys"] == wanted
    assert evicting.memory().by_component["keys"] == 3 * 2 * 65 * (RANK + SHARED + INDEX) * 4
    assert packed.memory().by_component["index"] == 3 * 2 * 256 * (INDEX * 4 + 1)
    assert all((kept == 256).all() for kept in packed.memory().tokens_kept)


def test_gear_packs_what_a_full_cache_holds(model):
    ids, more = prompt(100, 2), prompt(1, 2, seed=4)
    theirs = DynamicCache(config=model.config)
    feed(model, theirs, ids)
    fed, filled = GEARCache(model, bits=4, tail_bits=None), GEARCache(model, bits=4, tail_bits=None).fill(theirs)
    feed(model, fed, ids)
    assert_close(feed(model, filled, more), feed(model, fed, more))
    theirs.layers[1].indexer_keys = None
    with pytest.raises(ValueError, match=r"layer 1 should hold index keys .*, got None"):
        GEARCache(model).fill(theirs)


def test_other_caches_and_none_choose_as_ever():
    """Of a model that a cache was built for; it is released, copied and pickled with its indexers."""
    model, ids = build(), prompt(40, 2)
    attention = model.model.layers[0].self_attn
    wanted, none = full_logits(model, ids, None), model(ids, use_cache=False).logits
    assert_close(feed(model, DenseCache(model), ids), wanted)
    assert "forward" in vars(attention.indexer)
    assert_close(full_logits(model, ids, None), wanted)
    assert_close(model(ids, use_cache=False).logits, none)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(feed(other, DenseCache(other), ids), wanted)
        assert vars(other.model.layers[0].self_attn.indexer)["forward"].model is other.model.layers[0].self_attn.indexer
    release(model)
    assert "forward" not in vars(attention.indexer)
    assert_close(full_logits(model, ids, None), wanted)


def test_autocast_and_half_precision_stay_near(batch):
    ids, mask = batch
    model = build(initializer_range=0.1)
    with torch.autocast(DEVICE, torch.bfloat16):
        said = feed(model, DenseCache(model), ids, mask)
        wanted = full_logits(model, ids, mask)
    near = (said - wanted)[mask.bool()].abs().amax(-1) < 0.1 * float(wanted.abs().max())
    # rounding may choose another token
    assert float(near.float().mean()) > 0.7


REFUSED = {
    "shadowkv": (lambda model: ShadowKVCache(model, budget=64), "ShadowKVCache does not hold them"),
    "hydragen": (HydragenCache, "HydragenCache does not hold them"),
    "kvzip": (lambda model: EvictingCache(model, policy=KVzip(), budget=9), "KVzip, which reads tokens twice"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_hold_index_keys_says_so(model, make, reason):
    with pytest.raises(ValueError, match=reason):
        make(model)


@pytest.mark.parametrize("name", ["qwen4_exp_text", "deepseek_v32"])
def test_indexers_of_other_kinds_are_refused_by_name(name):
    try:
        config = AutoConfig.for_model(name)
    except ValueError:
        pytest.skip(f"this transformers has no {name}")
    reason = "supports from transformers 5.24 on"
    if "indexed_attention" in config.layer_types:
        reason = "of a kind that kvcompress does not know"
        vars(config).update(index_topk=None, indexer_compress_ratio=None)
    with pytest.raises(ValueError, match=rf"{name} chooses what tokens attend to by .*{reason}"):
        check_served(config, name)


@roomy
def test_generate_compiles_no_steps(model, make):
    """On a GPU it would, where a cache says that it can be compiled for."""
    cache = make(model)
    assert not cache.is_compileable
    generate(model, cache, prompt(30, seed=5))
    cache.reserve(2)
    assert not cache.is_compileable
