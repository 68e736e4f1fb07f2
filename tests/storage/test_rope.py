"""Rope against the models' own rotary code: their rotary modules, their apply functions, their keys."""

import sys
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompress import hf
from kvcompress.storage.rope import Rope

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
ROTARY = {
    "llama": {"model_type": "llama"},
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama_llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_yarn": {"model_type": "llama", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "sliding_window": 8},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "layer_types": ALTERNATING},
    "phi3": {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "cohere": {"model_type": "cohere"},
    "glm": {"model_type": "glm", "head_dim": 32},
}


def make(model_type, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    settings = {name: value for name, value in (SIZES | changes).items() if value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(model_type, **settings)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def own_rotation(model, layer, x, positions):
    """x [batch, heads, tokens, head_dim] at positions [batch, tokens], as the model's own functions rotate it."""
    rotary = model.base_model.rotary_emb
    types = getattr(model.config, "layer_types", None)
    kind = {"layer_type": types[layer]} if isinstance(getattr(rotary, "rope_type", None), dict) else {}
    cos, sin = rotary(x, positions, **kind)
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    return apply(x, x, cos, sin)[0]


@pytest.mark.parametrize("family", list(ROTARY))
def test_it_rotates_as_the_models_own_functions_do(family):
    model = make(**ROTARY[family])
    head_dim = getattr(model.config, "head_dim", None) or 16
    positions = torch.tensor([[0, 1, 5, 63, 1000, 20_000]])
    x = torch.randn(2, 3, 6, head_dim)
    for layer in range(4):
        rope = Rope.of(model, layer)
        expected = own_rotation(model, layer, x, positions.expand(2, -1))
        torch.testing.assert_close(rope.rotate(x, positions[:, None]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", list(ROTARY))
def test_rotating_back_and_forth_changes_nothing(family):
    model = make(**ROTARY[family])
    head_dim = getattr(model.config, "head_dim", None) or 16
    positions = torch.cat([torch.arange(100), torch.tensor([4095, 131_071, 1_000_003])])
    x = torch.randn(2, 3, len(positions), head_dim)
    rope = Rope.of(model, 1)
    assert (rope.unrotate(rope.rotate(x, positions), positions) - x).abs().max() <= 1e-6
    assert (rope.rotate(rope.unrotate(x, positions), positions) - x).abs().max() <= 1e-6


def test_layers_of_different_types_have_their_own_frequencies():
    model = make(**ROTARY["gemma3"])
    sliding, full = Rope.of(model, 0), Rope.of(model, 1)
    assert torch.equal(sliding.inv_freq, Rope.of(model, 2).inv_freq)
    assert not torch.equal(sliding.inv_freq, full.inv_freq)


def test_yarn_scales_and_the_way_back_scales_back():
    rope = Rope.of(make(**ROTARY["llama_yarn"]), 0)
    assert rope.scaling > 1.1
    x = torch.randn(5, 16)
    torch.testing.assert_close(rope.rotate(x, torch.arange(5)).norm(dim=-1), rope.scaling * x.norm(dim=-1))


@pytest.mark.parametrize(("family", "rotary_dim"), [("phi3", 8), ("gpt_neox", 4), ("glm", 16), ("llama", 16)])
def test_dimensions_past_the_rotary_ones_stay_as_they_are(family, rotary_dim):
    rope = Rope.of(make(**ROTARY[family]), 0)
    assert rope.rotary_dim == rotary_dim
    x = torch.randn(4, 32)
    turned = rope.rotate(x, torch.arange(1, 5))
    assert torch.equal(turned[:, rotary_dim:], x[:, rotary_dim:])
    assert not torch.isclose(turned[:, : rotary_dim // 2], x[:, : rotary_dim // 2]).all()


def test_pairs_are_told_apart():
    assert not Rope.of(make(**ROTARY["llama"]), 0).interleaved
    assert Rope.of(make(**ROTARY["cohere"]), 0).interleaved


def test_only_differences_of_positions_matter():
    rope = Rope.of(make("llama"), 0)
    query, key = torch.randn(16), torch.randn(16)
    dots = [
        rope.rotate(query, torch.tensor(7 + shift)) @ rope.rotate(key, torch.tensor(3 + shift)) for shift in (0, 5, 900)
    ]
    torch.testing.assert_close(dots[1], dots[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(dots[2], dots[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama_yarn", "phi3", "cohere"])
def test_the_average_rotation_is_the_mean_of_the_rotations(family):
    rope = Rope.of(make(**ROTARY[family]), 0)
    x, first = torch.randn(2, 3, 16), torch.tensor([[4], [90]])
    each = torch.stack([rope.rotate(x, first + step) for step in range(50)])
    torch.testing.assert_close(rope.rotate_average(x, first, 50), each.mean(0), atol=1e-5, rtol=1e-4)


def test_a_pair_that_does_not_turn_is_its_own_average():
    rope = Rope(torch.tensor([0.5, 0.0]))
    x = torch.ones(4)
    torch.testing.assert_close(rope.rotate_average(x, torch.tensor(3), 7)[[1, 3]], x[[1, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_vectors_is_kept(dtype):
    rope = Rope.of(make("llama", dtype=dtype), 0)
    x = torch.randn(3, 16, dtype=dtype)
    there = rope.rotate(x, torch.arange(3))
    assert there.dtype == dtype
    torch.testing.assert_close(
        rope.unrotate(there, torch.arange(3)), x, atol=0.05 if dtype == torch.bfloat16 else 1e-6, rtol=0.02
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
        ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    ],
)
def test_a_model_without_rotary_embeddings_has_none(model_type, changes):
    model = make(model_type, **changes)
    assert [Rope.of(model, layer) for layer in range(2)] == [None, None]


def test_a_layer_that_does_not_rotate_has_none():
    model = make("smollm3", no_rope_layers=[1, 0, 1, 0])
    assert [Rope.of(model, layer) is None for layer in range(4)] == [False, True, False, True]
    model = make("cohere2", layer_types=ALTERNATING, sliding_window=8)
    assert [Rope.of(model, layer) is None for layer in range(4)] == [False, True, False, True]


# docs: ShadowKV refuses RoPE whose frequencies change with the length (dynamic, longrope)
@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "'dynamic'"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, "'longrope'"),
    ],
)
def test_frequencies_that_change_with_the_length_are_refused_by_name(model_type, changes, words):
    with pytest.raises(ValueError, match=f"of type {words}, whose frequencies change with the length"):
        Rope.of(make(model_type, **changes), 0)


def test_rotary_embeddings_of_an_unknown_kind_are_refused_by_name():
    model = make("gptj", n_embd=64, n_layer=4, n_head=4, rotary_dim=8)
    with pytest.raises(ValueError, match="layer 0 of GPTJForCausalLM applies rotary embeddings in its own way"):
        Rope.of(model, 0)


def test_keys_that_are_normed_after_their_rotation_are_refused():
    model = make("hunyuan_v1_dense", head_dim=16)
    # equal weights commute with a rotation, trained ones do not
    with torch.no_grad():
        model.model.layers[0].self_attn.key_layernorm.weight.copy_(torch.linspace(0.1, 3.0, 16))
    with pytest.raises(ValueError, match="does not rotate its keys as its HunYuanDenseV1RotaryEmbedding says"):
        Rope.of(model, 0)


@pytest.mark.parametrize(
    ("model_type", "layer", "changes"),
    [
        (
            "jamba",
            1,
            {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2, "use_mamba_kernels": False},
        ),
        ("granitemoehybrid", 1, {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    ],
)
def test_a_hybrid_that_only_carries_the_code_has_no_rotary_embeddings(model_type, layer, changes):
    model = make(model_type, **changes)
    assert hf.rotary_of(model, layer) is None
