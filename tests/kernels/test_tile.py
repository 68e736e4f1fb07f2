import pytest
import torch

from kvcompress.kernels.common.tile import MIN_SIDE, rows_aligned, tile_widths


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (64, (64, 0)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (128, (128, 0)),
        (129, (128, 16)),
        (192, (128, 64)),
    ],
)
def test_widths_waste_little(head_dim, expected):
    assert tile_widths(head_dim) == expected


def test_widths_cover_any_head_dim_with_powers_of_two():
    for head_dim in range(1, 257):
        width, tail = tile_widths(head_dim)
        assert head_dim <= width + tail < 2 * head_dim + MIN_SIDE
        assert width >= MIN_SIDE
        assert all(side & (side - 1) == 0 for side in (width, tail))


def test_a_head_dim_without_kernels_is_refused():
    with pytest.raises(ValueError, match="at most 256, got 257"):
        tile_widths(257)


def test_aligned_rows_are_passed_as_they_are_and_others_copied():
    aligned = torch.randn(2, 3, 4, 32).transpose(1, 2)
    assert rows_aligned(aligned) is aligned
    offset = torch.randn(2 * 32 + 1)[1:].view(2, 32)
    for other in (aligned.mT.contiguous().mT, torch.randn(2, 5, 40)[..., :32], offset):
        copy = rows_aligned(other)
        assert copy is not other
        assert torch.equal(copy, other)
        assert all(stride % 16 == 0 for stride in copy.stride()[:-1])
        assert copy.stride(-1) == 1
        assert copy.data_ptr() % 16 == 0
    padded = rows_aligned(torch.ones(2, 5, 33))
    assert padded.shape == (2, 5, 48)
    assert padded.sum() == 2 * 5 * 33
