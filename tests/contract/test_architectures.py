"""Every family of models, head layout, head size and precision; and refusal, by name, of what cannot be served."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.policies.expected_attention import ExpectedAttention
from tests.contract.caches import caches, every_cache, those
from tests.contract.drive import full, generate, recorded
from tests.contract.models import DEVICE, FAMILIES, families, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle

LAYOUTS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1), "odd group": (6, 2)}


# README: on any decoder-only model that uses transformers' attention interface
# README: Decoder-only models are supported
@every_cache
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_equals_the_oracle(entry, family):
    model = tiny(family)
    _, _, transcript = recorded(entry, model, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]))
    assert_equals_oracle(model, transcript)


@those(lambda entry: entry.exact)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_with_the_full_cache_what_it_always_did(entry, family):
    model = tiny(family)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    assert torch.equal(generate(model, entry.build(model), ids, mask), full(model, ids, mask))


@caches("dense", "h2o", "snapkv", "keydiff")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_head_layout_equals_the_oracle(entry, layout):
    heads, kv_heads = LAYOUTS[layout]
    model = tiny("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=96)
    _, _, transcript = recorded(entry, model, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]))
    assert_equals_oracle(model, transcript)


@caches("dense", "h2o")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_head_size_equals_the_oracle(entry, head_dim, family):
    model = tiny(family, head_dim=head_dim, initializer_range=0.1)
    _, cache, transcript = recorded(entry, model, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]))
    assert cache.layers[0].kv_shape == (2, 2, head_dim)
    assert_equals_oracle(model, transcript)


# docs: Heads may be of any width, keys and values of two.
@caches("gear", "gear_centred", "h2o_packed", "h2o_packed_heads")
@pytest.mark.parametrize("head_dim", [288, 512])
def test_heads_of_more_than_a_byte_of_channels_are_packed(entry, head_dim):
    model = tiny("llama", head_dim=head_dim, num_key_value_heads=1, initializer_range=0.05)
    _, cache, transcript = recorded(entry, model, *left_padded([prompt(40)[0], prompt(33, seed=2)[0]]))
    assert_equals_oracle(model, transcript)
    if entry.name == "gear":
        index = cache.layers[0].prompt.values.outlier_index
        assert index.dtype == torch.int16
        assert int(index.max()) > 255


@every_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@families("llama", slow=("mistral", "gemma2"))
def test_half_precision_equals_the_oracle(entry, dtype, family):
    # weights that leave the logits of a trained model's size, for a tolerance that means something
    model = tiny(family, dtype=dtype, initializer_range=0.1)
    _, cache, transcript = recorded(entry, model, *left_padded([prompt(20)[0], prompt(13, seed=2)[0]]))
    # eight and eleven bits, rounded some ten times a layer in three layers
    tolerance = 0.08 if dtype == torch.bfloat16 else 0.01
    assert transcript.forwards[0].logits.std() > 0.5
    assert_equals_oracle(model, transcript, rtol=0.0, atol=tolerance)
    for layer in cache.layers:
        for segment in layer.segments():
            for name, tensor in segment.tensors().items():
                if name in ("keys", "values"):
                    assert tensor.dtype == dtype
                elif name == "scores":
                    assert tensor.dtype == torch.float32


@caches("dense", "h2o", "tova")
def test_a_mixture_of_previous_attentions_makes_no_difference(entry):
    """What the model used before is what others get; our caches attend by themselves."""
    answers = [recorded(entry, tiny("llama", attention=attention), prompt(20, 2))[0] for attention in ("sdpa", "eager")]
    assert torch.equal(*answers)


# refusals


def from_config(model_type, auto=AutoModelForCausalLM, **settings):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, **settings})
    return auto.from_config(config).to(DEVICE)


REFUSED = {
    "mamba2": (
        {"head_dim": 8, "num_heads": 8, "n_groups": 1},
        "has no attention whose keys and values could be compressed",
    ),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, "AttentionInterface"),
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 2}, "AttentionInterface"),
    "falcon": ({"alibi": True}, "AttentionInterface"),
    "codegen": ({"n_embd": 32, "n_head": 2, "n_layer": 2, "rotary_dim": 8}, "AttentionInterface"),
}


# README: Refused by name: encoder-decoders, attention biases
@pytest.mark.parametrize("model_type", REFUSED)
@pytest.mark.parametrize("build", [DenseCache, lambda model: H2OCache(model, budget=8)], ids=["dense", "h2o"])
def test_what_cannot_be_served_is_refused_by_name(model_type, build):
    settings, reason = REFUSED[model_type]
    try:
        model = from_config(model_type, **settings)
    except (ImportError, ValueError, KeyError) as error:
        pytest.skip(f"this transformers does not build {model_type}: {error}")
    if model_type == "codegen" and model._can_set_attn_implementation():
        pytest.skip("this transformers gives codegen the attention interface")
    with pytest.raises(ValueError, match=reason):
        build(model)


# README: encoder-decoders
@pytest.mark.parametrize("build", [DenseCache, lambda model: H2OCache(model, budget=8)], ids=["dense", "h2o"])
def test_an_encoder_decoder_is_refused_by_name(build):
    model = from_config("t5", AutoModelForSeq2SeqLM, d_model=32, d_ff=32, d_kv=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        build(model)


def test_a_refused_model_keeps_its_attention():
    settings, _ = REFUSED["bloom"]
    model = from_config("bloom", **settings)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="AttentionInterface"):
        DenseCache(model)
    assert model.config._attn_implementation == before


def test_a_policy_that_needs_rotary_embeddings_says_so_or_does_without():
    """OPT has learned positions: ExpectedAttention then foresees queries without turning them."""
    model = tiny("opt")
    cache = EvictingCache(model, policy=ExpectedAttention(), budget=8)
    assert generate(model, cache, prompt(20)).shape == (1, 32)
