"""A tiny model with the architecture of a large one."""

import pytest
from transformers import AutoConfig

from kvcompress import hf
from kvcompress.hf.small import described, small_config, small_model


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 24 * 80}),
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("smollm3", {}),
        ("nemotron", {}),
    ],
)
def test_a_small_model_has_the_features_of_the_large_one(model_type, changes):
    large = AutoConfig.for_model(model_type, **changes)
    untouched = large.to_dict()
    small = small_config(large)
    assert large.to_dict() == untouched
    of_large, of_small = hf.sizes(large), hf.sizes(small)
    assert type(small) is type(large)
    assert of_small.head_dim == of_large.head_dim
    group = min(16, of_large.heads // of_large.kv_heads)
    # a config without a head_dim of its own is as wide as its heads are together
    assert of_small.heads // of_small.kv_heads == (group if hasattr(large, "head_dim") else min(group, 2))
    assert of_small.kv_heads == min(of_large.kv_heads, 1 if group > 8 else 2)
    assert of_small.learned_positions == of_large.learned_positions
    assert of_small.layers <= 8
    assert of_small.hidden <= 512
    windows = hf.attention_windows(small)
    assert len(windows) == of_small.layers
    assert {window is None for window in windows} == {window is None for window in hf.attention_windows(large)}
    assert max((window for window in windows if window), default=0) <= 64
    for name in ("rope_parameters", "attn_logit_softcapping", "attention_bias", "rotary_pct"):
        assert getattr(small, name, None) == getattr(large, name, None)
    if model_type == "smollm3":
        assert set(small.no_rope_layers) == {0, 1}
    model = small_model(large)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6
    assert described(model).startswith(f"{model_type} ({type(model).__name__}), {of_small.layers} layers")


FEW_GLOBAL = {"num_global_key_value_heads": 2, "attention_k_eq_v": True}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma4_text", {}),
        ("gemma4_text", {"num_attention_heads": 16, "num_key_value_heads": 8, **FEW_GLOBAL}),
        ("gemma4_unified_text", {"num_attention_heads": 32, "num_key_value_heads": 8, **FEW_GLOBAL}),
        ("laguna", {"num_hidden_layers": 4, "num_attention_heads_per_layer": [48, 64, 16, 64]}),
        ("mimo_v2_flash", {}),
    ],
)
def test_layers_of_unlike_heads_stay_unlike(model_type, changes):
    """Each layer keeps its widths and its queries per KV head, also where only the config of a layer has them."""
    large = AutoConfig.for_model(model_type, **changes)
    untouched, every = large.to_dict(), hf.layer_heads(large)
    small = small_config(large)
    assert large.to_dict() == untouched
    of_kinds = {(own.heads // own.kv_heads, own.head_dim, own.value_dim) for own in every}
    assert {(own.heads // own.kv_heads, own.head_dim, own.value_dim) for own in hf.layer_heads(small)} == of_kinds
    assert len(of_kinds) > 1 or model_type == "mimo_v2_flash"
    model = small_model(large)
    for index, own in enumerate(hf.layer_heads(small)):
        attention = hf.attention_module(model, index)
        assert attention.q_proj.out_features == own.heads * own.head_dim
        assert attention.k_proj.out_features == own.key_width
        assert attention.o_proj.in_features == own.heads * own.value_dim


def test_the_heads_of_a_layer_are_told_apart_in_a_fingerprint():
    one, other = (
        small_model(AutoConfig.for_model("gemma4_text", num_global_key_value_heads=heads, attention_k_eq_v=True))
        for heads in (None, 1)
    )
    found = hf.Fingerprint.of(other)
    assert "16 heads, 8,8,8,8,8,2 KV heads, head_dim 256,256,256,256,256,512" in found.sizes
    with pytest.raises(ValueError, match="They differ in sizes"):
        hf.Fingerprint.of(one).check(found, "the cache")
