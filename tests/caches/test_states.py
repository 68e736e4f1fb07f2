"""Hybrids: layers with states (linear attention, Mamba, convolutions) keep them, and only attention is compressed."""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompress import (
    AcrossKVCache,
    AttentionMatchingCache,
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    PrefixStore,
    ShadowKVCache,
    SnapKVCache,
    measure_basis,
    measure_profile,
)
from kvcompress.check.typical import COMMON, HYBRIDS
from kvcompress.hf import cache_argument, decoder_of, full_cache, layer_kinds
from kvcompress.policies.tova import TOVA
from tests.contract.caches import SHADOW
from tests.contract.drive import feed, full, generate
from tests.contract.models import PAD, left_padded, prompt

every_hybrid = pytest.mark.parametrize("hybrid", HYBRIDS)
# transformers begins a second turn of several tokens with empty states
MAMBA_1 = ("jamba", "zamba")
CACHES = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=400),
    "snapkv": lambda model: SnapKVCache(model, budget=400, window=3, kernel=3),
    "kvzip": lambda model: KVzipCache(model, budget=400, sinks=1, chunk=9),
    "shadowkv": lambda model: ShadowKVCache(model, **SHADOW | {"budget": 10_000, "rank": None}),
}


@functools.cache
def made(hybrid):
    """A tiny model, shared by the tests."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(hybrid, **{**COMMON, **HYBRIDS[hybrid]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def model(hybrid):
    return made(hybrid)


def own(model):
    return full_cache(model)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-3 * float(wanted.abs().max()), rtol=1e-3)


def turns(model, cache):
    """A prompt, two tokens, a second turn, a token: the logits of all."""
    ids = prompt(60, seed=4)
    pieces = ids[:, :40], ids[:, 40:41], ids[:, 41:42], ids[:, 42:55], ids[:, 55:56]
    return torch.cat([feed(model, cache, piece) for piece in pieces], 1)


@every_hybrid
def test_the_models_here_are_hybrids(hybrid, model):
    kinds = layer_kinds(model.config)
    assert any(kind.attends for kind in kinds)
    assert any(kind.states for kind in kinds)


@pytest.mark.parametrize("name", CACHES)
@every_hybrid
def test_with_room_for_all_turns_equal_those_of_transformers_cache(hybrid, model, name):
    if name == "shadowkv" and hybrid == "zamba2":
        with pytest.raises(ValueError, match="RoPE|rotary|how it rotates its keys"):
            CACHES[name](model)
        return
    wanted = turns(model, own(model))
    with torch.no_grad():
        if hybrid not in MAMBA_1:
            close(wanted, model(prompt(60, seed=4)[:, :56], use_cache=False).logits)
    close(turns(model, CACHES[name](model)), wanted)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@every_hybrid
def test_generation_of_padded_batches_and_beams(hybrid, model, settings):
    ids, mask = left_padded([prompt(30, seed=5)[0], prompt(17, seed=6)[0]])
    settings = {"max_new_tokens": 8, **settings}
    if hybrid == "minimax":
        # whose own cache leaves states behind when beams change rows
        wanted = model.generate(
            ids, attention_mask=mask, use_cache=False, do_sample=False, pad_token_id=PAD, **settings
        )
    else:
        wanted = full(model, ids, mask, **settings)
    for name in ("dense", "h2o", "kvzip"):
        assert torch.equal(generate(model, CACHES[name](model), ids, mask, **settings), wanted), name


def test_minimax_goes_on_where_its_first_layer_attends_to_nothing():
    """transformers' own cache begins anew at position 0 there."""
    types = ["linear_attention", "full_attention"]
    config = AutoConfig.for_model(
        "minimax", **{**COMMON, **HYBRIDS["minimax"], "num_hidden_layers": 2, "layer_types": types}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(prompt(60, seed=4)[:, :56], use_cache=False).logits
    for name in ("dense", "h2o"):
        close(turns(model, CACHES[name](model)), wanted)


# docs: (Jamba, Zamba) begin a forward of several tokens with empty states
@pytest.mark.parametrize("hybrid", MAMBA_1)
def test_mamba_1_goes_on_token_by_token_only(hybrid, model):
    ids = prompt(30, seed=4)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, 20:]
    for build in (own, DenseCache):
        at_once, one_by_one = build(model), build(model)
        feed(model, at_once, ids[:, :20])
        feed(model, one_by_one, ids[:, :20])
        assert float((feed(model, at_once, ids[:, 20:]) - wanted).abs().max()) > 0.1 * float(wanted.abs().max())
        close(torch.cat([feed(model, one_by_one, ids[:, at : at + 1]) for at in range(20, 30)], 1), wanted)


# README: of hybrids the layers that attend
@every_hybrid
def test_eviction_shows_and_frees_memory(hybrid, model):
    """States are what they were, and keys and values shrink: what evicts differs from the full cache, within bounds."""
    wanted, ids = turns(model, own(model)), prompt(60, seed=4)
    cache, dense = H2OCache(model, budget=8), DenseCache(model)
    found = turns(model, cache)
    close(found[:, :40], wanted[:, :40])
    assert float((found[:, 40:] - wanted[:, 40:]).abs().max()) > 1e-3 * float(wanted.abs().max())
    feed(model, dense, ids[:, :56])
    held, all_of_it = cache.memory().by_component, dense.memory()
    assert held["keys"] <= 0.3 * all_of_it.by_component["keys"]
    assert held["states"] == all_of_it.by_component["states"] > 0
    assert all_of_it.full_bytes == all_of_it.by_component["states"] + 2 * sum(56 * 2 * 16 * 4 for _ in dense.attending)
    assert len(cache.memory().tokens_kept) == len(cache.attending)
    assert all((kept == 8).all() for kept in cache.memory().tokens_kept)


@every_hybrid
def test_a_second_reading_goes_on_from_the_states_and_leaves_them(hybrid, model):
    """Each layer is fed what it would be fed if the text came again."""
    if hybrid in MAMBA_1:
        pytest.skip("transformers begins a second turn of several tokens with empty states")
    ids, read = prompt(40, seed=4), []
    cache, dense, full_cache = KVzipCache(model, budget=8, sinks=1, chunk=100, prompt=()), DenseCache(model), own(model)
    hook = decoder_of(model).register_forward_hook(lambda module, args, out: read.append(out.last_hidden_state))
    try:
        feed(model, cache, ids)
        feed(model, full_cache, ids)
        feed(model, full_cache, ids)
        feed(model, dense, ids)
    finally:
        hook.remove()
    # the second reading is part of the forward, and ends before it
    second, first, alone, again, _ = read
    close(first, alone)
    close(second, again)
    for index, states in cache.states.items():
        for name, tensor in states.tensors().items():
            torch.testing.assert_close(tensor, dense.states[index].tensors()[name])


@pytest.mark.parametrize("build", [DenseCache, lambda model: H2OCache(model, budget=8), GEARCache])
@every_hybrid
def test_clones_rows_and_files_carry_the_states(hybrid, model, build, tmp_path):
    cache = build(model)
    ids = prompt(30, 2, seed=7)
    feed(model, cache, ids)
    more = prompt(3, 2, seed=8)
    wanted = feed(model, cache.clone(), more)
    # the clone went on, and the cache did not
    close(feed(model, cache.clone(), more), wanted)
    for codec in (None, "zstd"):
        cache.save(tmp_path / "cache.safetensors", codec=codec)
        close(feed(model, type(cache).load(tmp_path / "cache.safetensors", model), more), wanted)
    swapped = cache.clone()
    swapped.reorder_cache(torch.tensor([1, 0]))
    close(feed(model, swapped, more.flip(0)), wanted.flip(0))
    one = cache.clone()
    one.batch_select_indices(torch.tensor([1]))
    close(feed(model, one, more[1:]), wanted[1:])
    many = cache.clone()
    many.batch_repeat_interleave(2)
    close(feed(model, many, more.repeat_interleave(2, 0)), wanted.repeat_interleave(2, 0))
    before = cache.memory().by_component["states"]
    cache.reset()
    assert cache.memory().total_bytes == 0
    feed(model, cache, ids)
    assert cache.memory().by_component["states"] == before
    close(feed(model, cache, more), wanted)


@every_hybrid
def test_states_cannot_be_cropped_and_nothing_changes(hybrid, model):
    cache = DenseCache(model)
    feed(model, cache, prompt(20))
    with pytest.raises(ValueError, match="layer [01] keeps states"):
        cache.crop(-2)
    assert cache.get_seq_length() == 20
    assert all(int(layer.get_seq_length()) == 20 for layer in cache.layers)


def test_inference_mode_leaves_states_that_go_on_outside_of_it():
    model = made("qwen3_next")
    cache = DenseCache(model)
    with torch.inference_mode():
        feed(model, cache, prompt(20))
    assert torch.isfinite(feed(model, cache, prompt(1))).all()


@pytest.mark.parametrize("hybrid", ["qwen3_next", "falcon_h1"])
def test_what_does_not_serve_hybrids_says_so(hybrid, model):
    cache = DenseCache(model)
    feed(model, cache, prompt(20))
    for build in (
        lambda: HydragenCache(model),
        lambda: PrefixStore(model).prefix(prompt(20)[0]),
        lambda: HydragenCache.from_cache(cache),
        lambda: AcrossKVCache(model, share=1, skip_from=1),
        lambda: GEARCache(model).fill(own(model)),
        lambda: AttentionMatchingCache.from_cache(cache, prompt(20), budget=8),
    ):
        with pytest.raises(ValueError, match="states"):
            build()


def test_budgets_of_a_pyramid_are_of_the_layers_that_attend():
    cache = EvictingCache(made("qwen3_next"), policy=TOVA(), budget=16, allocation="pyramid")
    budgets = [cache.layers[index].budget for index in cache.attending]
    assert sum(budgets) == 2 * 16
    assert budgets[0] > budgets[1]


def test_models_without_attention_are_refused():
    config = AutoConfig.for_model("mamba2", num_hidden_layers=2, hidden_size=32, head_dim=8, num_heads=8, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match="Mamba2ForCausalLM has no attention whose keys and values could be compressed"
    ):
        DenseCache(model)


def test_a_hybrid_none_of_whose_layers_attends_is_refused():
    config = AutoConfig.for_model("lfm2", **COMMON, num_hidden_layers=2, layer_types=["conv", "conv"])
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match="model type 'lfm2' has no attention whose keys and values could be compressed"
    ):
        DenseCache(model)


def test_a_model_that_begins_its_positions_anew_is_not_answered_wrongly():
    """transformers' Bamba needs position_ids, which `generate` passes: without them, its positions go backwards."""
    model, ids = made("bamba"), prompt(20)
    cache = DenseCache(model)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
        with pytest.raises(ValueError, match="position ids must continue"):
            model(ids[:, :1], **cache_argument(model, cache))
        # the layers before the first that attends have taken it in
        with pytest.raises(RuntimeError, match="was interrupted"):
            feed(model, cache, ids[:, :1])
        cache.reset()
        feed(model, cache, ids)
        wanted = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
        close(feed(model, cache, ids[:, :1]), wanted)


@every_hybrid
@pytest.mark.parametrize("build", [DenseCache, lambda model: H2OCache(model, budget=400)], ids=["dense", "h2o"])
def test_what_is_refused_changes_no_states(hybrid, model, build):
    ids, cache = prompt(60, seed=4), build(model)
    feed(model, cache, ids[:, :20])
    wanted = feed(model, cache.clone(), ids[:, 20:23])
    # Zamba has no positions
    if hybrid != "zamba":
        with pytest.raises(ValueError, match="position ids must continue"):
            feed(model, cache, ids[:, 20:23], position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match="the cache holds 1 sequences, got 2"):
        feed(model, cache, ids[:, 20:23].expand(2, -1))
    torch.testing.assert_close(feed(model, cache, ids[:, 20:23]), wanted, rtol=0, atol=0)


@every_hybrid
@pytest.mark.parametrize("layer", [0, -1])
def test_a_forward_that_is_cut_off_at_any_layer_is_noticed(hybrid, model, layer):
    def stop(*args):
        raise KeyboardInterrupt

    ids, cache = prompt(60, seed=4), DenseCache(model)
    feed(model, cache, ids[:, :20])
    layers = decoder_of(model).layers
    hook = layers[layer].register_forward_pre_hook(stop) if layer else layers[0].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids[:, 20:23])
    hook.remove()
    for use in (lambda: feed(model, cache, ids[:, 20:23]), lambda: cache.save("never")):
        with pytest.raises(RuntimeError, match=r"interrupted.*call cache.reset\(\)"):
            use()
    cache.reset()
    torch.testing.assert_close(
        feed(model, cache, ids[:, :9]), feed(model, DenseCache(model), ids[:, :9]), rtol=0, atol=0
    )


@every_hybrid
def test_what_is_measured_of_all_layers_and_compaction_refuse_by_name(hybrid, model):
    ids = prompt(60, seed=4)
    for measure in (lambda: measure_profile(model, [ids], budgets=[20]), lambda: measure_basis(model, [ids])):
        with pytest.raises(ValueError, match="has layers that keep states"):
            measure()
    cache = AttentionMatchingCache(model, budget=40, chunk=100)
    feed(model, cache, ids[:, :40])
    with pytest.raises(ValueError, match="layers that keep states no longer have what came before"):
        cache.compact(ids[:, :40], budget=20)
