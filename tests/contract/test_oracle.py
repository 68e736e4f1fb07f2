"""The judge is judged first: it agrees with transformers where nothing is dropped, and disagrees where something is."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress import DenseCache, H2OCache
from kvcompress.hf import cache_argument
from tests.contract.caches import everything, slots
from tests.contract.models import FAMILIES, PAD, build, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle, recording


def generate(model, cache, kept, ids, mask=None, tokens=6):
    with recording(model, cache, kept) as transcript:
        mask = torch.ones_like(ids) if mask is None else mask
        model.generate(
            ids,
            attention_mask=mask,
            **cache_argument(model, cache),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=PAD,
        )
    return transcript


@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_with_transformers_own_cache(family):
    model = build(family)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    transcript = generate(model, DynamicCache(config=model.config), lambda cache: [None] * 4, ids, mask)
    assert transcript.fed == [20, 1, 1, 1, 1, 1]
    assert_equals_oracle(model, transcript)


def test_it_sees_one_token_too_many():
    def liar(cache):
        kept = slots(cache)
        row, head, place = (~kept[1]).nonzero()[0]
        kept[1][row, head, place] = True
        return kept

    model = tiny()
    transcript = generate(model, H2OCache(model, budget=8), liar, prompt(20))
    with pytest.raises(AssertionError, match="forward 1"):
        assert_equals_oracle(model, transcript)


def test_it_sees_one_token_too_few():
    def liar(cache):
        kept = slots(cache)
        row, head, place = kept[2].nonzero()[0]
        kept[2][row, head, place] = False
        return kept

    model = tiny()
    transcript = generate(model, H2OCache(model, budget=8), liar, prompt(20))
    with pytest.raises(AssertionError, match="forward 1"):
        assert_equals_oracle(model, transcript)


def test_it_sees_a_position_that_is_not_the_next():
    model = tiny()
    cache = H2OCache(model, budget=8)
    with torch.no_grad(), recording(model, cache, slots) as transcript:
        model(prompt(20), **cache_argument(model, cache))
        model(prompt(1), position_ids=torch.tensor([[28]]), **cache_argument(model, cache))
        transcript.forwards[-1].position_ids = torch.tensor([[20]])
    with pytest.raises(AssertionError, match="forward 1"):
        assert_equals_oracle(model, transcript)


def test_decoded_tensors_take_the_place_of_what_was_fed():
    model = tiny()
    wrong = {"by": 0.0}

    def decoded(cache):
        held = [layer.dense.held() for layer in cache.layers]
        return [(key.clone() + wrong["by"], value.clone()) for key, value, _ in held]

    for error in (0.0, 0.1):
        wrong["by"] = error
        cache = DenseCache(model)
        with torch.no_grad(), recording(model, cache, everything, decoded) as transcript:
            model(prompt(12, 2), **cache_argument(model, cache))
            model(prompt(3, 2, seed=5), **cache_argument(model, cache))
        if error:
            with pytest.raises(AssertionError, match="forward 1"):
                assert_equals_oracle(model, transcript)
        else:
            assert_equals_oracle(model, transcript)
