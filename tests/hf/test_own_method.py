"""Older families attend in a method of their own: GPT-Neo, with windows on some layers, and GPT-NeoX-Japanese."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvcompress import DenseCache, H2OCache, hf, release
from kvcompress.check.check import check
from kvcompress.hf import cache_argument
from tests.contract.drive import feed, full, generate
from tests.contract.models import DEVICE, left_padded, prompt

WINDOW = 16
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
TYPES = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "intermediate_size": 48},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
}
of_each = pytest.mark.parametrize("name", TYPES)


def build(name, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **TYPES[name], **changes}))
    # with those of 0.02 tokens hardly attend
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    return model.to(DEVICE).eval()


@pytest.fixture
def batch():
    return left_padded([prompt(40)[0] % 90 + 1, prompt(27, seed=2)[0] % 90 + 1])


@pytest.mark.parametrize(("name", "caches"), [("gpt_neo", ("h2o", "gear")), ("gpt_neox_japanese", ("h2o", "shadowkv"))])
def test_every_promise_is_kept(name, caches):
    model = build(name)
    outcomes = {row.cache: (row.outcome, row.reason) for row in check(model, caches)}
    assert hf.attention_name(model) == "eager"
    assert {outcome for outcome, _ in outcomes.values()} == {"OK"}, outcomes


@of_each
def test_it_generates_as_with_transformers_own_cache(name, batch):
    model, (ids, mask) = build(name), batch
    settings = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    wanted = full(model, ids, mask, **settings)
    assert torch.equal(generate(model, DenseCache(model), ids, mask, **settings), wanted)
    assert torch.equal(full(model, ids, mask, **settings), wanted)


@of_each
def test_other_caches_and_none_are_as_ever_and_a_model_is_released(name, batch):
    model, (ids, mask) = build(name), batch
    wanted, alone = feed(model, DynamicCache(config=model.config), ids, mask), model(ids, use_cache=False).logits
    feed(model, DenseCache(model), ids, mask)
    assert torch.equal(feed(model, DynamicCache(config=model.config), ids, mask), wanted)
    assert torch.equal(model(ids, use_cache=False).logits, alone)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        said = feed(other, DenseCache(other), ids, mask)[mask.bool()]
        torch.testing.assert_close(said, wanted[mask.bool()], rtol=0.0, atol=1e-3)
    release(model)
    assert model.config._attn_implementation == "eager"
    assert not [module for module in model.modules() if "_attn" in vars(module)]
    cache = DenseCache(build(name))
    with pytest.raises(RuntimeError, match="did not attend through it"):
        model(ids, **cache_argument(model, cache))


def test_windows_are_those_of_local_layers():
    model, ids = build("gpt_neo"), prompt(40) % 90 + 1
    assert hf.attention_windows(model.config) == [None, WINDOW]
    unwindowed = build("gpt_neo", window_size=400)
    far = feed(unwindowed, DynamicCache(config=unwindowed.config), ids)[:, -1]
    assert not torch.allclose(far, feed(model, DynamicCache(config=model.config), ids)[:, -1], atol=1e-2)


def test_rerotated_needs_rotary_positions():
    """Also where all layers have windows, in which no gap is to be closed."""
    model = build("gpt_neo", attention_types=[[["local", "local"], 1]])
    with pytest.raises(ValueError, match="rerotated closes gaps between rotary positions, and GPTNeoForCausalLM has n"):
        H2OCache(model, budget=24, rerotated=True)
