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
