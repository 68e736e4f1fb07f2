import itertools

import pytest
import torch

from kvcompress.kernels import quantise as quantise_kernel
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme
from kvcompress.kernels.common.runtime import runs_triton
from kvcompress.kernels.low_rank import residual_factors, residual_factors_reference
from kvcompress.kernels.quantise import dequantise
from kvcompress.kernels.quantise import quantise_reference as quantise
from tests.kernels.inputs import DEVICE, DTYPES, blocks

# bits, group, axis, outliers, rank, blocks, block, head_dim
CASES = [
    (2, 64, "channel", 0, 2, 3, 64, 64),
    (2, 64, "token", 1, 4, 3, 64, 80),
    (3, 16, "channel", 2, 4, 5, 16, 96),
    (4, 32, "token", 1, 1, 2, 8, 129),
    (8, 32, "channel", 1, 20, 1, 64, 64),
    (4, 64, "channel", 0, 2, 2, 128, 64),
]


def product(factors):
    left, right = factors
    return left.float() @ right.float()[:, :, None].mT


@pytest.mark.parametrize(("bits", "group", "axis", "outliers", "rank", "count", "block", "head_dim"), CASES, ids=str)
def test_factors_agree_with_the_reference(bits, group, axis, outliers, rank, count, block, head_dim):
    agree(QuantScheme(bits, group, axis, outliers), blocks(2, 1, count, block, head_dim), rank)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_factors_agree_with_the_reference_in_16_bits(dtype):
    agree(QuantScheme(2, 16, "channel", 1), blocks(1, 2, 2, 16, 64, dtype), 2)


def test_slices_of_a_larger_storage_agree_with_the_reference():
    coding = QuantScheme(2, 16, "channel", 1)
    x = blocks(3, 2, 4, 16, 64)
    packed = quantise(x, coding)
    part = QuantizedTensor(*(None if part is None else part[1:, :, 1:3] for part in packed))
    agree(coding, x[1:, :, 1:3], 2, part)


def agree(coding, x, rank, packed=None):
    batch, kv_heads, count, block, head_dim = x.shape
    packed = packed or quantise(x, coding)
    present = torch.ones(batch, count, dtype=torch.bool, device=DEVICE)
    present[-1, 0] = count == 1
    found, expected = (
        factors(x, packed, coding, rank, present, dtype=torch.float32)
        for factors in (residual_factors, residual_factors_reference)
    )
    assert [part.shape for part in found] == [(batch, kv_heads, count, block, rank), (batch, kv_heads, head_dim, rank)]
    # the sign of a direction is free, what the directions span is not
    size = product(expected).abs().max().item()
    torch.testing.assert_close(product(found), product(expected), rtol=0, atol=2e-3 * size)


@pytest.mark.skipif(runs_triton(torch.empty(0, device=DEVICE)), reason="only the PyTorch path has pieces")
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_the_size_of_the_pieces_changes_nothing(pieces, monkeypatch):
    coding = QuantScheme(2, 16, "channel", 1)
    x = blocks(2, 2, 5, 16, 64)
    packed = quantise(x, coding)
    whole = product(residual_factors(x, packed, coding, 2))
    monkeypatch.setattr(quantise_kernel, "_PIECE", 2 * 2 * 16 * 64 * pieces)
    assert len(quantise_kernel.blocks_apart(x)) == -(-5 // pieces)
    torch.testing.assert_close(product(residual_factors(x, packed, coding, 2)), whole, rtol=0, atol=1e-2 * whole.max())


@pytest.mark.parametrize(("axis", "outliers"), [*itertools.product(("channel", "token"), (0, 1))])
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_lower_the_error_of_every_head(axis, outliers, rank):
    coding = QuantScheme(2, 64, axis, outliers, rank)
    x = blocks(1, 2, 2, 64, 64)
    packed = quantise(x, coding)
    left, right = residual_factors(x, packed, coding, rank)
    corrected = packed._replace(left=left, right=right[:, :, None])

    def error(packed):
        return (dequantise(packed, coding) - x).flatten(2).norm(dim=-1)

    assert (error(corrected) < error(packed)).all()
    # and nearly as far as any factors of that rank can
    residual = (x - dequantise(packed, coding)).flatten(2, 3)
    best = torch.linalg.svdvals(residual)[..., rank:].norm(dim=-1)
    assert (error(corrected) <= 1.05 * best).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_as_many_factors_as_channels_are_exact(axis):
    coding = QuantScheme(2, 16, axis, 1, 64)
    # fewer tokens than channels in the first case
    for count in (2, 5):
        x = blocks(1, 1, count, 16, 64)
        packed = quantise(x, coding)
        left, right = residual_factors(x, packed, coding, 64, dtype=torch.float32)
        decoded = dequantise(packed._replace(left=left, right=right[:, :, None]), coding)
        torch.testing.assert_close(decoded, x, rtol=1e-5, atol=2e-5)


def test_a_row_and_a_head_have_the_factors_they_have_alone():
    coding = QuantScheme(2, 16, "channel", 1, 2)
    x = blocks(3, 2, 3, 16, 64)
    whole = residual_factors(x, quantise(x, coding), coding, 2)
    alone = residual_factors(x[1:2, 1:], quantise(x[1:2, 1:], coding), coding, 2)
    torch.testing.assert_close(product(whole)[1:2, 1:], product(alone), rtol=0, atol=1e-3)


def test_absent_blocks_take_no_part():
    coding = QuantScheme(2, 16, "token", 1, 2)
    x = blocks(2, 2, 4, 16, 64)
    packed = quantise(x, coding)
    present = torch.tensor([[True, False, True, True], [False, False, True, True]], device=DEVICE)
    left, right = residual_factors(x, packed, coding, 2, present)
    assert not left[0, :, 1].any()
    assert not left[1, :, :2].any()
    # contents that were never packed
    other = torch.where(present[:, None, :, None, None], x, 100.0)
    again = residual_factors(other, packed, coding, 2, present)
    torch.testing.assert_close((left, right), again)
    alone = residual_factors(x[1:, :, 2:], quantise(x[1:, :, 2:], coding), coding, 2)
    torch.testing.assert_close(product((left, right))[1:, :, 2:], product(alone), rtol=0, atol=1e-3)


def test_no_residual_gives_no_correction():
    x = torch.ones(1, 2, 2, 16, 64, device=DEVICE)
    coding = QuantScheme(2, 16, "channel", 0, 4)
    left, right = residual_factors(x, quantise(x, coding), coding, 4)
    assert not left.any()
    assert right.isfinite().all()


@pytest.mark.parametrize(("rank", "loops", "text"), [(0, 3, "1 to head_dim = 64"), (65, 3, "got 65"), (2, 0, "loops")])
def test_impossible_settings_are_refused(rank, loops, text):
    coding = QuantScheme(2, 16, "channel")
    x = blocks(1, 1, 1, 16, 64)
    with pytest.raises(ValueError, match=text):
        residual_factors(x, quantise(x, coding), coding, rank, loops=loops)
