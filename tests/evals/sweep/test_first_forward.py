"""A forward recorded once fills evicting caches as the model would."""

import pytest
import torch

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.protocol import Reader, answer
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.snapkv import SnapKV
from tests.evals.sweep.test_protocol import prompts

POLICIES = [H2O(), KeyDiff(), SnapKV(window=4, recent=4), ExpectedAttention()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_cache_filled_from_a_recording_is_the_cache_that_the_model_fills(model, policy):
    # rows of several lengths, so that some are padded
    asked = prompts()
    rows = [prompt.context for prompt in asked]
    recorded = FirstForward(model, rows)
    readers = [Reader(model, EvictingCache(model, policy=policy, budget=20)) for _ in range(2)]
    recorded.fill(readers[0])
    readers[1].read(rows)
    for filled, read in zip(*(reader.cache.layers for reader in readers), strict=True):
        for name, tensor in read.slots.tensors().items():
            assert torch.equal(filled.slots.tensors()[name], tensor), name
    questions = [prompt.question for prompt in asked]
    assert torch.equal(*(reader.read(questions) for reader in readers))
    assert readers[0].measure() == readers[1].measure()


def test_one_recording_serves_caches_one_after_the_other(model):
    asked = prompts()
    recorded = FirstForward(model, [prompt.context for prompt in asked])
    for budget in (12, 30):
        make = lambda: H2OCache(model, budget=budget)  # noqa: B023, E731 (called before the next budget)
        with_it = answer(model, make, asked, "question-agnostic", first=recorded.fill)
        assert with_it == answer(model, make, asked, "question-agnostic")


def test_other_caches_are_refused(model):
    recorded = FirstForward(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"fills an empty EvictingCache; got DenseCache that has seen 0 tokens"):
        recorded.fill(Reader(model, DenseCache(model)))
    with pytest.raises(ValueError, match=r"got EvictingCache that has seen 0 tokens"):
        recorded.fill(Reader(model, EvictingCache(model, policy=KVzip(), budget=20)))
    used = Reader(model, H2OCache(model, budget=4))
    used.read([[1, 2]])
    with pytest.raises(ValueError, match=r"got H2OCache that has seen 2 tokens"):
        recorded.fill(used)


def test_a_cache_class_of_ones_own_is_fed_by_the_model(model):
    class Mine(H2OCache):
        """It may count forwards, or attend to less."""

    assert FirstForward.serves(H2OCache(model, budget=12))
    assert not FirstForward.serves(Mine(model, budget=12))
