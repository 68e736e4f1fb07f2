import math

import pytest
import torch

from kvcompress.kernels.merge import merge_stack, merge_states, merge_states_reference
from tests.kernels.inputs import DEVICE, DTYPES, heads, needs_triton


def states(count, dim, dtype=torch.float32, tokens=7):
    outs = [heads(2, 3, tokens, dim, dtype) for _ in range(count)]
    return outs, [4 * torch.randn(2, 3, tokens, device=DEVICE) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "dim", "tokens"), [(2, 64, 1), (2, 129, 7), (3, 80, 7), (5, 96, 3)])
def test_the_merge_agrees_with_the_reference(count, dim, tokens, dtype):
    outs, lses = states(count, dim, dtype, tokens)
    torch.testing.assert_close(merge_states(outs, lses), merge_states_reference(outs, lses))


@pytest.mark.parametrize("merge", [merge_states, merge_states_reference])
def test_merging_parts_equals_attending_to_all_keys(merge):
    query, key, value = (torch.randn(2, 4, n, 32, device=DEVICE) for n in (3, 20, 20))

    def attend(keys):
        logits = query @ key[:, :, keys].mT / math.sqrt(32)
        return logits.softmax(-1) @ value[:, :, keys], logits.logsumexp(-1)

    parts = [attend(slice(*ends)) for ends in ((0, 9), (9, 13), (13, 20))]
    torch.testing.assert_close(merge(*map(list, zip(*parts, strict=True))), attend(slice(None)))


@pytest.mark.parametrize("merge", [merge_states, merge_states_reference])
def test_an_empty_state_changes_nothing_whatever_its_output_holds(merge):
    (out,), (lse,) = states(1, 64)
    nothing, unseen = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(merge([nothing, out, nothing], [unseen, lse, unseen]), (out, lse))
    torch.testing.assert_close(merge([nothing] * 2, [unseen] * 2), (torch.zeros_like(out), unseen))


@pytest.mark.parametrize("merge", [merge_states, merge_states_reference])
def test_huge_log_sum_exps_do_not_overflow(merge):
    outs, lses = states(2, 64)
    shifted = [lse + 1e4 for lse in lses]
    torch.testing.assert_close(merge(outs, shifted)[0], merge(outs, lses)[0], rtol=1e-2, atol=1e-2)


@needs_triton
@pytest.mark.parametrize("parts", [1, 3, 17, 40])
def test_a_stack_merges_like_a_list(parts):
    # so far apart that exp overflows unless the highest is subtracted
    outs, lses = torch.randn(parts, 2, 3, 2, 80, device=DEVICE), 80 * torch.randn(parts, 2, 3, 2, device=DEVICE)
    lses[0, 0], lses[:, 1, 1] = -torch.inf, -torch.inf
    outs[0, 0], outs[:, 1, 1] = torch.nan, torch.nan
    expected = merge_states_reference(list(outs), list(lses))
    # a float32 near 200 is known to 1e-5, which exp turns into as much of a weight
    torch.testing.assert_close(merge_stack(outs, lses, torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_mismatched_shapes_are_named_in_the_error():
    (out,), (lse,) = states(1, 64)
    with pytest.raises(
        ValueError, match=r"got outs \[\[2, 3, 7, 64\], \[2, 3, 7, 64\]\], lses \[\[2, 3, 7\], \[2, 3\]\]"
    ):
        merge_states([out, out], [lse, lse[..., 0]])
    with pytest.raises(ValueError, match="at least one"):
        merge_states([], [])


@pytest.mark.parametrize("merge", [merge_states, merge_states_reference])
@pytest.mark.parametrize("of", ["out", "lse", "both"])
@pytest.mark.parametrize("light", [False, True])
def test_nan_comes_through_however_little_it_weighs(merge, of, light):
    (out, other), (lse, other_lse) = states(2, 64)
    if light:
        # exp of the difference is 0 in float32
        other_lse = lse - 200.0
    expected = merge([out, other], [lse, other_lse])
    if of != "lse":
        other[0, 1, 2] = torch.nan
    if of != "out":
        other_lse[0, 1, 2] = torch.nan
    expected[0][0, 1, 2] = torch.nan
    if of != "out":
        expected[1][0, 1, 2] = torch.nan
    torch.testing.assert_close(merge([out, other], [lse, other_lse]), expected, equal_nan=True)
    torch.testing.assert_close(merge([other, out], [other_lse, lse]), expected, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("parts", [2, 20])
def test_nan_comes_through_a_stack(parts):
    outs, lses = torch.randn(parts, 2, 3, 2, 80, device=DEVICE), torch.randn(parts, 2, 3, 2, device=DEVICE)
    outs[-1, 0, 0, 0, 3], lses[-1, 1] = torch.nan, torch.nan
    lses[-1, 0] -= 200.0
    lses[:-1, 1, 2], lses[0, 0, 0] = torch.nan, -torch.inf
    expected = merge_states_reference(list(outs), list(lses))
    assert expected[0].isnan().sum() == 1 + 3 * 2 * 80
    torch.testing.assert_close(merge_stack(outs, lses, torch.float32), expected, equal_nan=True)
