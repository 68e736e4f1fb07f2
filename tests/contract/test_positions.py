"""The model's own positions: what follows on is served, what goes back is refused."""

import pytest
import torch

from kvcompress import EvictingCache, H2OCache, HydragenCache, KVzipCache, ShadowKVCache
from kvcompress.hf import cache_argument
from kvcompress.policies.expected_attention import ExpectedAttention
from tests.contract.caches import all_those, caches, every_cache, those
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def at(first, tokens):
    return torch.arange(first, first + tokens, device=DEVICE)[None]


# README: Position ids that go backwards, as when a prompt is fed twice
@every_cache
def test_a_prompt_fed_a_second_time_is_refused_and_nothing_is_lost(entry):
    model = tiny("llama")
    ids = prompt(20)
    with torch.no_grad():
        cache, other = entry.build(model), entry.build(model)
        for each in (cache, other):
            model(ids, **cache_argument(model, each))
        with pytest.raises(
            ValueError, match=r"continue from.*row 0 had (a token at position 19|20 tokens).* at 0.*cache\.reset"
        ):
            model(ids, position_ids=at(0, 20), **cache_argument(model, cache))
        assert cache.get_seq_length() == 20
        following = prompt(3, seed=2)
        found, expected = (
            model(following, position_ids=at(20, 3), **cache_argument(model, each)).logits for each in (cache, other)
        )
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="continue from"):
            model(following[:, :1], position_ids=at(22, 1), **cache_argument(model, cache))


def test_positions_that_a_model_does_not_pass_to_its_attention_are_read_too():
    """Llama 4 rotates by them before."""
    model, ids = tiny("llama4"), prompt(20)
    with torch.no_grad():
        cache = H2OCache(model, budget=8)
        model(ids, position_ids=at(0, 20), **cache_argument(model, cache))
        with pytest.raises(ValueError, match="row 0 had a token at position 19, but its next one is at 0"):
            model(ids, position_ids=at(0, 20), **cache_argument(model, cache))
        assert cache.get_seq_length() == 20
        cache = EvictingCache(model, policy=ExpectedAttention(), budget=40)
        model(ids, position_ids=at(5, 20), **cache_argument(model, cache))
        with pytest.raises(ValueError, match="row 0 has 30 where 25 comes next"):
            model(ids, position_ids=at(30, 20), **cache_argument(model, cache))


# codes of keys depend on how they are rotated
@all_those(
    lambda entry: not entry.name.startswith(("hydragen", "gear", "kivi", "h2o_packed", "attention_matching_packed"))
)
def test_positions_may_be_shifted(entry):
    model = tiny("llama")
    parts = ((prompt(20), 0), (prompt(1, seed=2), 20), (prompt(5, seed=3), 21))
    with torch.no_grad():
        logits = []
        for shift in (0, 64):
            cache = entry.build(model)
            logits.append(
                [model(ids, position_ids=at(shift + first, ids.shape[1]), **cache_argument(model, cache)).logits
                 for ids, first in parts]
            )  # fmt: skip
    for found, expected in zip(*logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@those(lambda entry: entry.name in ("dense", "h2o", "snapkv", "tova", "streaming"))
def test_positions_may_leave_gaps(entry):
    model = tiny("llama")
    ids, following = prompt(6), prompt(2, seed=2)
    positions = torch.cat([at(0, 6), at(106, 2)], 1)
    with torch.no_grad():
        cache = entry.build(model)
        model(ids, position_ids=at(0, 6), **cache_argument(model, cache))
        found = model(following, position_ids=at(106, 2), **cache_argument(model, cache)).logits
        # without a mask transformers takes a gap for the beginning of another sequence
        mask = torch.ones_like(positions)
        whole = model(
            torch.cat([ids, following], 1), attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, 6:]
    torch.testing.assert_close(found, whole, **CLOSE)


UNROTATING = {
    "rolled": lambda model: H2OCache(model, budget=10, rerotated=True),
    "expected": lambda model: EvictingCache(model, policy=ExpectedAttention(), budget=10),
    "shadowkv": lambda model: ShadowKVCache(model, budget=8),
}


@pytest.mark.parametrize("name", UNROTATING)
def test_where_rotations_are_taken_back_a_gap_is_refused(name):
    model = tiny("llama")
    cache = UNROTATING[name](model)
    with torch.no_grad():
        model(prompt(20), position_ids=at(7, 20), **cache_argument(model, cache))
        with pytest.raises(ValueError, match="row 0 has 127 where 27 comes next"):
            model(prompt(3), position_ids=at(127, 3), **cache_argument(model, cache))
        model(prompt(3, seed=4), position_ids=at(27, 3), **cache_argument(model, cache))
        with pytest.raises(ValueError, match="row 0 has 32 where 31 comes next"):
            model(prompt(3), position_ids=torch.tensor([[30, 32, 33]], device=DEVICE), **cache_argument(model, cache))


@pytest.mark.parametrize("shift", ["padding", 5, 64])
def test_kvzip_reads_again_where_the_model_stands(shift):
    """A row whose positions are shifted keeps what it keeps alone."""
    model = build("llama")
    row = prompt(30, seed=3)[0]
    with torch.no_grad():
        alone = KVzipCache(model, budget=16)
        model(row[None], **cache_argument(model, alone))
        cache = KVzipCache(model, budget=16)
        if shift == "padding":
            # without position ids the model counts columns, padding too
            ids, mask = left_padded([row, prompt(47, seed=4)[0]])
            model(ids, attention_mask=mask, **cache_argument(model, cache))
        else:
            model(row[None], position_ids=at(shift, 30), **cache_argument(model, cache))
    for held, wanted in zip(cache.layers, alone.layers, strict=True):
        kept = [set(layer.slots.positions[0].flatten().tolist()) - {-1} for layer in (held, wanted)]
        assert kept[0] == kept[1]


# docs: `HydragenCache` compares the tokens that it is fed again
def test_hydragen_is_fed_again_what_rows_hold():
    model = tiny("llama")
    ids = torch.cat([prompt(20), prompt(20)])
    cache = HydragenCache(model, ids)
    seen = int(cache.get_seq_length())
    with torch.no_grad():
        found = model(ids[:, seen:], position_ids=at(seen, 20 - seen), **cache_argument(model, cache)).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, seen:], **CLOSE)


# README: and padding on the right in `generate` are refused
@every_cache
@pytest.mark.parametrize("continues", [False, True])
def test_padding_behind_a_prompt_is_refused_in_generate(entry, continues):
    """Its last column is a pad's, from whose logits and position transformers would go on."""
    model = tiny("llama")
    ids = prompt(20, 2)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    cache = entry.build(model)
    if continues:
        with torch.no_grad():
            model(ids[:, :5], **cache_argument(model, cache))
    with pytest.raises(ValueError, match="row 1 .*padding|padded on the left; a row has padding after"):
        model.generate(ids, attention_mask=mask, **cache_argument(model, cache), max_new_tokens=4, do_sample=False)


@every_cache
def test_the_forward_of_another_model_is_refused_and_nothing_is_lost(entry):
    model, other = tiny("llama"), build("llama", seed=1)
    cache, straight = entry.build(model), entry.build(model)
    entry.build(other)
    ids, token = prompt(20, 2), prompt(1, 2, seed=3)
    with torch.no_grad():
        for each in (cache, straight):
            model(ids, **cache_argument(model, each))
        with pytest.raises(ValueError, match="was filled by another model than the LlamaModel .*one cache per model"):
            other(token, **cache_argument(other, cache))
        found, expected = (model(token, **cache_argument(model, each)).logits for each in (cache, straight))
    assert torch.equal(found, expected)


@caches("dense", "h2o", "gear", "shadowkv", "hydragen")
def test_the_forward_of_a_model_that_shares_the_config_and_has_no_cache_is_refused_too(entry):
    model = tiny("llama")
    cache, straight = entry.build(model), entry.build(model)
    # kvcompress's attention is selected in the config, and nothing watches this model's forwards
    other = type(model)(model.config).eval()
    ids, token = prompt(20, 2), prompt(1, 2, seed=3)
    with torch.no_grad():
        for each in (cache, straight):
            model(ids, **cache_argument(model, each))
        with pytest.raises(ValueError, match="another model stored here: use one cache per model"):
            other(token, **cache_argument(other, cache))
        found, expected = (model(token, **cache_argument(model, each)).logits for each in (cache, straight))
    assert torch.equal(found, expected)


@every_cache
def test_positions_that_go_back_within_a_forward_are_refused(entry):
    model = tiny("llama")
    cache = entry.build(model)
    with torch.no_grad():
        for seen in (0, 20):
            with pytest.raises(ValueError, match="position ids must continue from what the cache has seen"):
                model(prompt(20), position_ids=at(seen, 20).flip(1), **cache_argument(model, cache))
            assert cache.get_seq_length() == seen
            model(prompt(20), position_ids=at(seen, 20), **cache_argument(model, cache))
