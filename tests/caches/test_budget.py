import numpy as np
import pytest
import torch

from kvcompress import H2OCache, ShadowKVCache
from kvcompress.caches.budget import count_or_fraction
from kvcompress.swiftkv.conversion import first_later
from tests.contract.models import tiny

BUDGET = ("budget", "a count of tokens", "the prompt")


@pytest.mark.parametrize(
    "build",
    [
        lambda budget: H2OCache(tiny(), budget=budget).budget,
        lambda budget: ShadowKVCache(tiny(), budget=budget).budget,
        lambda share: first_later(share, 64),
    ],
)
@pytest.mark.parametrize("given", [np.int64(32), np.float32(0.5), torch.tensor(32), torch.tensor(0.5), np.array(32)])
def test_numbers_of_numpy_and_torch_are_counts_and_fractions_too(build, given):
    assert build(given) == build(given.item())
    assert type(count_or_fraction(given, *BUDGET)) is type(given.item())


@pytest.mark.parametrize(
    "given", [True, np.True_, torch.tensor(True), "8", None, 1j, np.array([8]), torch.tensor([0.5])]
)
def test_what_is_no_number_is_refused_by_name(given):
    with pytest.raises(TypeError, match="budget must be a count of tokens .* got"):
        count_or_fraction(given, *BUDGET)


@pytest.mark.parametrize("given", [0.0, -0.5, 1.5, float("nan"), np.float64(2)])
def test_a_fraction_lies_above_0_and_up_to_1(given):
    with pytest.raises(ValueError, match=r"budget must be .*, or a fraction of the prompt in \(0, 1\] \(float\), got"):
        count_or_fraction(given, *BUDGET)


@pytest.mark.parametrize("budget", [2**31, 2**29 + 1])
def test_a_count_beyond_what_positions_can_tell_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be at most {2**29} tokens, got {budget}"):
        H2OCache(tiny(), budget=budget)
