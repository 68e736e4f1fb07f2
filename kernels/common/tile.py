"""Device functions that several kernels share: loading tiles of any width, and the logits of a tile.

A tile's sides are powers of two. A head_dim that is not one is split where that wastes less than rounding up:
80 is a tile of 64 and a tail of 16, 129 is 128 and 16. The tail is 0 where the tile alone covers the head_dim.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import INTERPRETED, WIDEST_HEAD, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
# the interpreter multiplies the bit patterns of bfloat16 operands
_WIDENS_OPERANDS = tl.constexpr(INTERPRETED)

# the least that the matrix units take, along every side
MIN_SIDE = 16


def tile_width(head_dim: int) -> int:
    """The width of one tile that covers head_dim."""
    if head_dim > WIDEST_HEAD:
        raise ValueError(f"the Triton kernels take a head_dim of at most {WIDEST_HEAD}, got {head_dim}")
    width: int = triton.next_power_of_2(head_dim)
    return max(MIN_SIDE, width)


def tile_widths(head_dim: int) -> tuple[int, int]:
    """The widths of a tile and of its tail that cover head_dim with the fewest columns."""
    whole = tile_width(head_dim)
    below = whole // 2
    tail = max(MIN_SIDE, triton.next_power_of_2(head_dim - below))
    return (below, tail) if below >= MIN_SIDE and below + tail < whole else (whole, 0)


def rows_aligned(tensor: Tensor) -> Tensor:
    """The tensor with rows that are contiguous and begin and end at multiples of 16 elements.

    Kernels then load 16 bytes at a time. Caches and projections are laid out so; others are copied, and a head_dim
    that is no multiple of 16 is padded with zeros.
    """
    excess = -tensor.shape[-1] % 16
    if excess:
        return torch.nn.functional.pad(tensor, (0, excess))
    aligned = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    if aligned and not any(stride % 16 for stride in tensor.stride()[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@triton.jit
def wide(index):
    # an index in int64, before it meets a stride
    return tl.full((), 0, tl.int64) + index


@triton.jit
def load_tile(ptr, offset, row_ok, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    # columns START .. START + WIDTH of the rows that begin at these offsets; 0 outside of the rows and of DIM
    dim = START + tl.arange(0, WIDTH)
    if START + WIDTH <= DIM:
        tile = tl.load(ptr + offset[:, None] + dim[None, :], mask=row_ok[:, None], other=0.0)
    else:
        tile = tl.load(ptr + offset[:, None] + dim[None, :], mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)
    return tile  # [rows, WIDTH]


@triton.jit
def store_tile(ptr, offset, tile, row_ok, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    dim = START + tl.arange(0, WIDTH)
    ok = row_ok[:, None] & (dim < DIM)[None, :]
    tl.store(ptr + offset[:, None] + dim[None, :], tile.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def bound_logits(logits, scale, softcap, SOFTCAPPED: tl.constexpr):
    # scale * q.k, bounded by softcap * tanh(. / softcap); tanh by exp saturates without overflow
    logits = logits * scale
    if SOFTCAPPED:
        logits = softcap - 2.0 * softcap / (tl.exp(logits * (2.0 / softcap)) + 1.0)
    return logits


@triton.jit
def dot(left, right, onto):
    # onto + left @ right in full precision: float32 operands are not rounded to tf32
    if _WIDENS_OPERANDS:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc=onto, input_precision="ieee")
