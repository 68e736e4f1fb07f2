import itertools
from typing import get_args

import pytest
import torch

from kvcompress.kernels import quantise as quantise_kernel
from kvcompress.kernels.common.quantized import Keeps, QuantScheme, pack_codes, unpack_codes
from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.kernels.quantise import dequantise, quantise, quantise_reference
from tests.kernels.inputs import DEVICE, DTYPES, blocks, some_of

# bits, group, axis, outliers, block, head_dim
CASES = [
    (2, 64, "channel", 0, 64, 64),
    (2, 64, "channel", 1, 64, 80),
    (2, 16, "channel", 2, 64, 128),
    (3, 32, "channel", 1, 64, 64),
    (4, 64, "channel", 1, 16, 96),
    (4, 32, "channel", 0, 128, 129),
    (8, 128, "channel", 1, 8, 64),
    (3, 64, "channel", 4, 8, 64),
    (2, 64, "token", 0, 64, 64),
    (2, 64, "token", 1, 64, 80),
    (2, 16, "token", 2, 64, 128),
    (3, 32, "token", 1, 64, 64),
    (4, 64, "token", 1, 16, 96),
    (4, 32, "token", 0, 128, 129),
    (8, 128, "token", 1, 8, 64),
    (3, 64, "token", 8, 8, 16),
    # more channels than a byte can tell apart
    (2, 64, "token", 2, 16, 300),
    (4, 512, "token", 1, 8, 512),
    (2, 16, "channel", 1, 16, 300),
]


def spread(groups, coding, x):
    """A scale for each number of x, in another way than the code's: by the index of its group."""
    block, head_dim = x.shape[-2:]
    if coding.axis == "channel":
        return groups.float()[..., torch.arange(block, device=x.device) // coding.group, :]
    return groups.float()[..., torch.arange(head_dim, device=x.device) // coding.group]


@pytest.mark.parametrize(("bits", "group", "axis", "outliers", "block", "head_dim"), CASES, ids=str)
def test_packing_agrees_with_the_reference(bits, group, axis, outliers, block, head_dim):
    agree_in_packing(blocks(2, 2, 1 if block > 16 else 2, block, head_dim), QuantScheme(bits, group, axis, outliers))


def test_outliers_are_found_again_among_more_channels_than_a_byte_can_tell_apart():
    x = blocks(2, 1, 2, 16, 300)
    x[..., 299] = 50.0
    x[..., 40] = -50.0
    packed = quantise(x, QuantScheme(2, 64, "token", 1))
    assert packed.outlier_index.dtype == torch.int16
    assert packed.outlier_index.unique().tolist() == [40, 299]
    decoded = dequantise(packed, QuantScheme(2, 64, "token", 1))
    assert (decoded[..., 299] - 50.0).abs().max() < 0.02
    # what is left has the range of the others
    assert (decoded - x).abs().max() < 8.0
    assert QuantScheme(2, 64, "token", 1).bytes(16, 300) * 4 == sum(part.nbytes for part in packed if part is not None)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_packing_agrees_with_the_reference_in_16_bits(axis, dtype):
    agree_in_packing(blocks(2, 1, 3, 16, 80, dtype), QuantScheme(3, 32, axis, 1))


def test_slices_of_a_larger_tensor_agree_with_the_reference():
    x = blocks(3, 3, 4, 16, 96)[1:, ::2, 1:3, :, 7:71]
    agree_in_packing(x, QuantScheme(2, 16, "channel", 1))
    agree_in_packing(x.mT.contiguous().mT, QuantScheme(2, 16, "token", 1))


def agree_in_packing(x, coding):
    found, expected = quantise(x, coding), quantise_reference(x, coding)
    for name, part, other in zip(found._fields, found, expected, strict=True):
        assert (part is None) == (other is None), name
        if part is not None:
            assert part.dtype == other.dtype
            assert part.is_contiguous()
            torch.testing.assert_close(part, other, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("bits", "group", "axis"), [*itertools.product((2, 3, 4, 8), (16, 64), ("channel", "token"))])
def test_no_number_is_further_from_its_decoding_than_half_a_step(bits, group, axis):
    coding = QuantScheme(bits, group, axis)
    # ranges and offsets over many orders of magnitude, float16's subnormal numbers among them
    x = blocks(2, 1, 2, 32, 80) * torch.logspace(-8, 3, 80, device=DEVICE)
    packed = quantise(x, coding)
    scales, zeros = spread(packed.scales, coding, x), spread(packed.zeros, coding, x)
    # float32's rounding of zero + scale * code
    slack = 2e-7 * (zeros.abs() + scales * 2**bits)
    assert ((x - dequantise(packed, coding)).abs() <= scales / 2 + slack).all()
    assert (zeros <= x + slack).all()


# bits, group, axis, zeros, block, head_dim
KEEPING = [
    (2, 16, "channel", "group", 64, 80),
    (3, 64, "channel", "group", 64, 64),
    (4, 32, "token", "group", 16, 96),
    (2, 128, "token", "group", 32, 80),
    (2, 128, "token", "block", 32, 80),
    (3, 64, "token", "none", 16, 64),
    (4, 64, "token", "block", 64, 64),
]


def in_groups(x, coding):
    """Groups as the last dimension."""
    if coding.axis == "channel":
        return x.unflatten(-2, (-1, coding.group)).transpose(-1, -2)
    return x.unflatten(-1, (-1, min(coding.group, x.shape[-1])))


@pytest.mark.parametrize("keeps", ["spread", "slope"])
@pytest.mark.parametrize(("bits", "group", "axis", "zeros", "block", "head_dim"), KEEPING, ids=str)
def test_scales_keep_what_they_are_asked_to(bits, group, axis, zeros, block, head_dim, keeps):
    coding = QuantScheme(bits, group, axis, zeros=zeros, keeps=keeps)
    x = 3 * torch.randn(2, 2, 3, block, head_dim, device=DEVICE)
    decoded = dequantise(quantise(x, coding), coding)
    if zeros == "block":
        x, decoded = (each - x.mean(-2, keepdim=True) for each in (x, decoded))
    own, found = (in_groups(each, coding).double() for each in (x, decoded))
    if zeros == "group":
        torch.testing.assert_close(found.mean(-1), own.mean(-1), rtol=0, atol=4e-3)
        own, found = (each - each.mean(-1, keepdim=True) for each in (own, found))
    kept = found.square().sum(-1) if keeps == "spread" else (own * found).sum(-1)
    torch.testing.assert_close(kept, own.square().sum(-1), rtol=4e-3, atol=0)
    # else it would keep that anyway
    packed, plain = quantise(x, coding), quantise(x, coding._replace(keeps="numbers"))
    assert torch.equal(packed.codes, plain.codes)
    assert not torch.equal(packed.scales, plain.scales)


@pytest.mark.parametrize("keeps", ["spread", "slope"])
@pytest.mark.parametrize(("bits", "group", "axis", "zeros", "block", "head_dim"), KEEPING, ids=str)
def test_scales_that_keep_agree_with_the_reference(bits, group, axis, zeros, block, head_dim, keeps):
    x = blocks(2, 1, 2, block, head_dim)
    x[0, 0, 0, 3, 5] = torch.nan
    x[1, 0, 1] = 0.5
    agree_in_packing(x, QuantScheme(bits, group, axis, zeros=zeros, keeps=keeps))


@pytest.mark.parametrize("keeps", ["spread", "slope"])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_groups_far_from_zero_are_not_shifted_by_what_float16_rounds(axis, keeps):
    coding = QuantScheme(3, 64, axis, keeps=keeps)
    x = torch.randn(1, 2, 4, 64, 64, device=DEVICE)
    x += 200 * torch.randn(64, device=DEVICE) if axis == "channel" else 200 * torch.randn(64, 1, device=DEVICE)
    packed = quantise(x, coding)
    dim = -2 if axis == "channel" else -1
    shift = (dequantise(packed, coding) - x).mean(dim, keepdim=True).abs()
    # of a range's codes, what rounds in single numbers
    assert (shift <= 0.12 * spread(packed.scales, coding, x)).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("value", [0.0, 1.5, -0.25, 60000.0])
def test_a_constant_group_is_exact(axis, value):
    x = torch.full((1, 2, 2, 16, 64), value, device=DEVICE)
    for coding in (QuantScheme(2, 16, axis, 2), *(QuantScheme(2, 16, axis, keeps=keeps) for keeps in get_args(Keeps))):
        packed = quantise(x, coding)
        assert not packed.scales.any()
        assert not packed.codes.any()
        assert (dequantise(packed, coding) == x).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_constant_that_float16_lacks_is_kept_better_than_by_float16(axis):
    x = torch.full((1, 1, 1, 16, 64), 0.1, device=DEVICE)
    error = (dequantise(quantise(x, QuantScheme(2, 64, axis)), QuantScheme(2, 64, axis)) - x).abs()
    assert error.max() <= (x.half().float() - x).abs().max()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_vectors_that_are_all_outliers_are_exact(axis):
    x = blocks(1, 1, 2, 16, 64, torch.float16).float()
    coding = QuantScheme(2, 16, axis, outliers=8 if axis == "channel" else 32)
    packed = quantise(x, coding)
    assert not packed.scales.any()
    assert not packed.zeros.any()
    assert (dequantise(packed, coding) == x).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_the_extremes_of_each_vector_are_its_outliers(axis):
    x = blocks(2, 2, 1, 16, 80)
    coding = QuantScheme(2, 16, axis, outliers=2)
    packed = quantise(x, coding)
    dim = -2 if axis == "channel" else -1
    order = x.argsort(dim)
    # the two largest, then the two smallest
    expected = torch.cat([order.flip(dim).narrow(dim, 0, 2), order.narrow(dim, 0, 2)], dim)
    assert (packed.outlier_index.long() == expected).all()
    found = dequantise(packed, coding).gather(dim, expected)
    torch.testing.assert_close(found, x.gather(dim, expected), rtol=2e-3, atol=2e-3)
    # and the others have a smaller range without them
    assert (packed.scales <= quantise(x, QuantScheme(2, 16, axis)).scales).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_among_equal_extremes_the_first_are_outliers_and_none_counts_twice(axis):
    x = torch.zeros(1, 1, 1, 8, 8, device=DEVICE)
    index = quantise(x, QuantScheme(2, 8, axis, outliers=3)).outlier_index
    expected = torch.tensor([0, 1, 2, 3, 4, 5], device=DEVICE)
    assert (index == (expected[:, None] if axis == "channel" else expected)).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_outliers_lower_the_error_over_all(axis):
    x = blocks(1, 2, 2, 64, 128)
    with_outliers, without = QuantScheme(2, 64, axis, outliers=2), QuantScheme(2, 64, axis)
    error = (dequantise(quantise(x, with_outliers), with_outliers) - x).norm()
    assert error < 0.8 * (dequantise(quantise(x, without), without) - x).norm()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_row_a_head_and_a_block_are_packed_as_if_alone(axis):
    coding = QuantScheme(3, 16, axis, outliers=1)
    x = blocks(2, 2, 2, 16, 80)
    whole, alone = quantise(x, coding), quantise(x[1:, 1:, 1:], coding)
    for part, other in zip(whole[:5], alone[:5], strict=True):
        assert (part[1:, 1:, 1:] == other).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 129])
def test_unpacking_is_the_inverse_of_packing(bits, head_dim):
    codes = torch.arange(2 * 16 * head_dim, device=DEVICE).view(2, 16, head_dim).remainder(2**bits).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 16 * bits // 8, head_dim)
    assert (unpack_codes(packed, bits) == codes).all()


def test_a_byte_holds_the_codes_of_tokens_that_are_a_plane_apart():
    codes = torch.zeros(16, 1, dtype=torch.uint8)
    codes[5] = 3
    # plane 1 of four, row 1
    assert pack_codes(codes, 2).flatten().tolist() == [0, 3 << 2, 0, 0]
    codes[5] = 7
    # its low bits as above; of the two rows of high bits row 1, bit 2
    assert pack_codes(codes, 3).flatten().tolist() == [0, 3 << 2, 0, 0, 0, 1 << 2]


@pytest.mark.parametrize(("bits", "group", "axis", "outliers", "block", "head_dim"), CASES, ids=str)
def test_bytes_are_those_of_the_formula(bits, group, axis, outliers, block, head_dim):
    coding = QuantScheme(bits, group, axis, outliers)
    packed = quantise(blocks(1, 2, 1, block, head_dim), coding)
    stored = sum(part.untyped_storage().nbytes() for part in packed if part is not None)
    assert stored == 2 * coding.bytes(block, head_dim)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_what_float16_cannot_hold_saturates(axis):
    x = torch.tensor([-1e6, 0.0, 1e6, 3e38], device=DEVICE).repeat(2, 1, 1, 8, 4)
    for outliers in (0, 1):
        coding = QuantScheme(2, 16, axis, outliers)
        assert dequantise(quantise(x, coding), coding).isfinite().all()


@pytest.mark.parametrize(
    ("coding", "shape", "text"),
    [
        (QuantScheme(5, 64, "channel"), (16, 64), "2, 3, 4 or 8 bits, got 5"),
        (QuantScheme(2, 64, "row"), (16, 64), "got 'row'"),
        (QuantScheme(2, 64, "channel"), (24, 64), "8 to 256, got 24"),
        (QuantScheme(2, 48, "channel"), (16, 64), "power of two from 8 on, got 48"),
        (QuantScheme(2, 64, "channel"), (16, 2**15 + 1), "head_dim must be 1 to 32768 to be packed"),
        (QuantScheme(2, 64, "channel", outliers=9), (16, 64), "at most 8, got 9"),
        (QuantScheme(2, 64, "token", outliers=33), (16, 64), "at most 32, got 33"),
        (
            QuantScheme(2, 64, "channel", zeros="block"),
            (16, 64),
            "zeros='block' is for whole tokens.* got groups of 64 along the channel of 64",
        ),
        (
            QuantScheme(2, 64, "token", 1, zeros="none"),
            (16, 64),
            "no outliers, got groups of 64 along the token of 64 channels, 2 bits and 1 outliers",
        ),
        (QuantScheme(8, 64, "token", zeros="none"), (16, 64), "up to 4 bits and no outliers, got .* 8 bits"),
        (QuantScheme(2, 16, "token", zeros="none"), (16, 64), "got groups of 16 along the token of 64 channels"),
        (QuantScheme(2, 64, "token", keeps="mean"), (16, 64), "keeps must be one of numbers, spread, slope, .* 'mean'"),
        (QuantScheme(2, 64, "token", 1, keeps="slope"), (16, 64), "with outliers numbers, got 'slope' and 1 outliers"),
        (QuantScheme(2, 64, "token", zeros="half"), (16, 64), "zeros must be one of group, block, none, got 'half'"),
    ],
)
def test_what_cannot_be_packed_is_refused(coding, shape, text):
    with pytest.raises(ValueError, match=text):
        quantise(torch.zeros(1, 1, 1, *shape, device=DEVICE), coding)


@some_of(
    {
        "bits, group, axis, outliers, block, head_dim": CASES,
        "number": [torch.nan, torch.inf, -torch.inf],
    },
    at_once=1,
)
def test_a_group_with_a_number_that_is_not_finite_is_nan_and_no_other_is(
    bits, group, axis, outliers, block, head_dim, number
):
    coding = QuantScheme(bits, group, axis, outliers)
    x = blocks(2, 2, 2, block, head_dim)
    expected = dequantise(quantise(x, coding), coding)
    # a whole group, and one number
    x[0, 0, 0, : min(group, block), 3] = number
    x[1, 1, 1, -1, -1] = number
    decoded = dequantise(quantise(x, coding), coding)
    if axis == "channel":
        expected[0, 0, 0, : min(group, block), 3] = torch.nan
        expected[1, 1, 1, -min(group, block) :, -1] = torch.nan
    else:
        expected[0, 0, 0, : min(group, block), 3 // group * group : (3 // group + 1) * group] = torch.nan
        expected[1, 1, 1, -1, (head_dim - 1) // group * group :] = torch.nan
    assert torch.equal(decoded.isnan(), expected.isnan())
    if not outliers:
        torch.testing.assert_close(decoded, expected, equal_nan=True)
    agree_in_packing(x, coding)


@pytest.mark.skipif(runs_triton(torch.empty(0, device=DEVICE)), reason="only the PyTorch path has pieces")
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("outliers", [0, 2])
def test_the_size_of_the_pieces_changes_no_code(pieces, outliers, monkeypatch):
    coding = QuantScheme(3, 16, "channel", outliers)
    x = blocks(2, 2, 5, 16, 64)
    whole = quantise_reference(x, coding)
    monkeypatch.setattr(quantise_kernel, "_PIECE", 2 * 2 * 16 * 64 * pieces)
    for part, expected in zip(quantise(x, coding), whole, strict=True):
        assert part is expected is None or torch.equal(part, expected)


# bits, group, zeros, block, head_dim
CENTRED = [
    (2, 64, "block", 64, 64),
    (2, 128, "none", 16, 80),
    (3, 256, "block", 32, 129),
    (4, 256, "none", 64, 128),
    (2, 64, "none", 8, 40),
]


def agree_around_zero(x, coding):
    """Sums in another order can round a scale, and a code at the border of two levels, to the other side."""
    found, expected = quantise(x, coding), quantise_reference(x, coding)
    assert (found.zeros is None) == (expected.zeros is None) == (coding.zeros == "none")
    torch.testing.assert_close(found.scales, expected.scales, rtol=2e-3, atol=1e-6, equal_nan=True)
    if found.zeros is not None:
        torch.testing.assert_close(found.zeros, expected.zeros, rtol=1e-3, atol=1e-4)
    different = (unpack_codes(found.codes, coding.bits) != unpack_codes(expected.codes, coding.bits)).float().mean()
    assert different < 2e-3


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("bits", "group", "zeros", "block", "head_dim"), CENTRED, ids=str)
def test_codes_around_zero_agree_with_the_reference(bits, group, zeros, block, head_dim, dtype):
    agree_around_zero(blocks(2, 2, 3, block, head_dim, dtype), QuantScheme(bits, group, "token", zeros=zeros))


@pytest.mark.parametrize(("bits", "group", "zeros", "block", "head_dim"), CENTRED, ids=str)
def test_codes_around_zero_take_the_bytes_of_the_formula(bits, group, zeros, block, head_dim):
    coding = QuantScheme(bits, group, "token", zeros=zeros)
    packed = quantise(blocks(1, 2, 1, block, head_dim), coding)
    assert sum(part.nbytes for part in packed if part is not None) == 2 * coding.bytes(block, head_dim)


# root mean square error of the best quantiser of normal numbers: of any levels, and of equally spaced ones
@pytest.mark.parametrize(("bits", "least"), [(2, 0.1175), (3, 0.0374), (4, 0.0115)])
@pytest.mark.parametrize("zeros", ["none", "block"])
def test_normal_numbers_lose_little_more_than_they_must(bits, least, zeros):
    x = torch.randn(1, 2, 8, 64, 64, device=DEVICE) * 3
    mean = 5 * torch.randn(1, 2, 8, 1, 64, device=DEVICE) if zeros == "block" else 0.0
    coding = QuantScheme(bits, 64, "token", zeros=zeros)
    lost = (dequantise(quantise(x + mean, coding), coding) - mean - x).square().mean() / 9
    # the scale follows each token, of which there are 64 numbers
    assert 0.8 * least < lost < 1.06 * least


def test_two_bits_around_zero_stand_for_four_levels_around_it():
    coding = QuantScheme(2, 64, "token", zeros="none")
    x = torch.randn(1, 1, 1, 16, 64, device=DEVICE)
    packed = quantise(x, coding)
    levels = 2 * dequantise(packed, coding)[0, 0, 0] / packed.scales[0, 0, 0].float()
    assert levels.round().unique().tolist() == [-3, -1, 1, 3]
    torch.testing.assert_close(levels, levels.round(), rtol=1e-5, atol=1e-5)
    # as near as its scale allows
    steps = torch.tensor([-1.5, -0.5, 0.5, 1.5], device=DEVICE) * packed.scales[0, 0, 0, :, :1, None].float()
    nearest = (x[0, 0, 0, ..., None] - steps).abs().amin(-1)
    torch.testing.assert_close((dequantise(packed, coding)[0, 0, 0] - x[0, 0, 0]).abs(), nearest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("zeros", ["none", "block"])
def test_around_zero_a_number_that_is_not_finite_makes_its_token_nan(zeros, number):
    coding = QuantScheme(2, 64, "token", zeros=zeros)
    x = blocks(1, 2, 2, 16, 64)
    x[0, 1, 0, 3, 20] = number
    missing = dequantise(quantise(x, coding), coding).isnan()
    assert missing[0, 1, 0, 3].all()
    assert missing.sum() == 64
    agree_around_zero(x, coding)


@pytest.mark.parametrize("zeros", ["none", "block"])
def test_around_zero_what_is_zero_and_what_is_huge_stays_finite(zeros):
    coding = QuantScheme(2, 16, "token", zeros=zeros)
    x = torch.tensor([-1e6, 0.0, 1e6, 3e38], device=DEVICE).repeat(2, 1, 1, 8, 4)
    assert dequantise(quantise(x, coding), coding).isfinite().all()
    assert dequantise(quantise(0 * x, coding), coding).eq(0).all()


@pytest.mark.parametrize("zeros", ["none", "block"])
def test_around_zero_a_row_a_head_and_a_block_are_packed_as_if_alone(zeros):
    coding = QuantScheme(2, 64, "token", zeros=zeros)
    x = blocks(2, 2, 2, 16, 64)
    whole, alone = quantise(x, coding), quantise(x[1:, 1:, 1:], coding)
    for part, other in zip(whole[:3], alone[:3], strict=True):
        assert part is None or (part[1:, 1:, 1:] == other).all()
