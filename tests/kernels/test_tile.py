import pytest

from kvcompress.kernels.tile import MIN_SIDE, tile_widths


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
