"""Low-rank factors of what quantisation loses.

GEAR (arXiv:2403.05527) adds to each quantised tensor the best few directions of its residual R = x - decoded, found
by power iteration. R is recomputed from x and its codes in every pass and never stored.

    P = uniform [head_dim, rank];  `loops` times:  P = orthonormal(R^T (R P))
    left = R P        right = P        R ~ left @ right^T = R P P^T

Departure from the paper: it projects onto the column space, Q Q^T R with Q = orthonormal(R P), after half a step less.
Projecting onto the row space takes as many passes, finds better directions, orthonormalises only a small matrix, and
lets later blocks share a basis. Both are projections of R: the error never grows, whatever the basis.

Bytes: x and its packed form are read loops + 1 times, left is written once. Flops: (4 * loops + 2) * batch * kv_heads *
tokens * head_dim * rank and loops + 1 decodings.
"""

from typing import get_args

import torch
from torch import Tensor

from kvcompress.kernels.common.packed_tile import (
    TileShape,
    load_decoded,
    tile_shape,
    tile_start,
    tile_tokens,
)
from kvcompress.kernels.common.quantized import (
    Axis,
    QuantizedTensor,
    QuantScheme,
    check_coding,
    coding_constants,
    empty_packed,
    stored_blocks,
)
from kvcompress.kernels.common.runtime import attends_in_triton, launch, shaped, tl, triton
from kvcompress.kernels.common.split_attention import split_keys
from kvcompress.kernels.common.tile import MIN_SIDE, dot, tile_width, wide
from kvcompress.kernels.quantise import blocks_apart, dequantise


def residual_factors(
    x: Tensor,
    packed: QuantizedTensor,
    coding: QuantScheme,
    rank: int,
    present: Tensor | None = None,
    *,
    loops: int = 3,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Factors of the residual of one span of blocks, for each row and KV head separately.

    Args:
        x: [batch, kv_heads, blocks, block, head_dim], what was packed.
        packed: its packed form; left and right are ignored.
        coding: of the packed form.
        rank: at most head_dim.
        present: [batch, blocks] bool; the tokens of other blocks take no part, and their left is 0. None: all are.
        loops: of the power iteration, at least 1.
        dtype: of the factors.

    Returns:
        left [batch, kv_heads, blocks, block, rank] and right [batch, kv_heads, head_dim, rank].

    Raises:
        ValueError: for a rank outside of 1 to head_dim, or loops below 1.
    """
    check_coding(coding, x.shape[-2], x.shape[-1])
    if not 1 <= rank <= x.shape[-1]:
        raise ValueError(f"rank must be from 1 to head_dim = {x.shape[-1]}, got {rank}")
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")
    if attends_in_triton(x) and x.numel():
        return _launch(x, packed, coding, rank, present, loops, dtype)
    batch, kv_heads, blocks, block, head_dim = x.shape
    left = x.new_empty(batch, kv_heads, blocks, block, rank, dtype=dtype)
    basis = first_basis(head_dim, rank, x.device).expand(batch, kv_heads, -1, -1)
    pieces = blocks_apart(x)
    for _ in range(loops):
        grown = x.new_zeros(batch, kv_heads, head_dim, rank, dtype=torch.float32)
        for piece in pieces:
            residual = _residual(x, packed, coding, present, piece)
            grown += residual.mT @ (residual @ basis)
        basis = torch.linalg.qr(grown).Q
    # so that the error is that of a projection onto what is stored
    right = basis.to(dtype)
    for piece in pieces:
        residual = _residual(x, packed, coding, present, piece)
        left[:, :, piece] = (residual @ right.float()).unflatten(2, (-1, block)).to(dtype)
    return left, right


def residual_factors_reference(
    x: Tensor,
    packed: QuantizedTensor,
    coding: QuantScheme,
    rank: int,
    present: Tensor | None = None,
    *,
    loops: int = 3,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """What residual_factors means, in plain PyTorch."""
    residual = x.float() - dequantise(packed._replace(left=None, right=None), coding)
    if present is not None:
        residual = residual.masked_fill(~present[:, None, :, None, None], 0.0)
    tokens = residual.flatten(2, 3)
    right = first_basis(x.shape[-1], rank, x.device)
    for _ in range(loops):
        right = torch.linalg.qr(tokens.mT @ (tokens @ right)).Q
    right = right.to(dtype)
    return (residual @ right.float()[:, :, None]).to(dtype), right


def first_basis(head_dim: int, rank: int, device: torch.device) -> Tensor:
    """Where the power iteration starts, [head_dim, rank] float32: the same everywhere and always."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(head_dim, rank, generator=generator).to(device)


def _residual(x: Tensor, packed: QuantizedTensor, coding: QuantScheme, present: Tensor | None, blocks: slice) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] of these blocks."""
    parts = (None if part is None else part[:, :, blocks] for part in packed[:5])
    residual = x[:, :, blocks].float() - dequantise(QuantizedTensor(*parts), coding)  # type: ignore[arg-type]
    if present is not None:
        residual.masked_fill_(~present[:, None, blocks, None, None], 0.0)
    return residual.flatten(2, 3)


def _launch(
    x: Tensor,
    packed: QuantizedTensor,
    coding: QuantScheme,
    rank: int,
    present: Tensor | None,
    loops: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, blocks, block, head_dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    packed, batch_blocks, head_blocks = stored_blocks(packed)
    present = None if present is None else present.contiguous().view(torch.uint8)
    width = tile_width(head_dim)
    tile = _tile(block, coding.bits, width)
    owners, rank_parts = batch * kv_heads, triton.cdiv(rank, _STEP)
    # tiles of absent blocks at the end count too: a split has whole tiles
    splits, split_tokens = split_keys(owners * rank_parts, tile.count(blocks) * tile.tokens, tile.tokens, x.device)
    left = x.new_empty(batch, kv_heads, blocks, block, rank, dtype=dtype)
    grown = x.new_empty(splits, owners, head_dim, rank, dtype=torch.float32)
    basis = first_basis(head_dim, rank, x.device).expand(batch, kv_heads, -1, -1).contiguous()

    def each_tile(basis: Tensor, writes_left: bool) -> None:
        launch(
            _residual_kernel, (owners * rank_parts * splits,),
            x, *packed[:5], present, basis, left if writes_left else None, None if writes_left else grown,
            *x.stride()[:4], batch_blocks, head_blocks, owners, kv_heads, blocks, rank, rank_parts, splits,
            split_tokens // tile.tokens, tile.count(blocks),
            **coding_constants(coding, packed, block, head_dim), **tile.constants(), HEAD_DIM=head_dim, DIM=width,
            RANK_STEP=_STEP, MASKED=present is not None, num_warps=_warps(width), num_stages=1,
        )  # fmt: skip

    for _ in range(loops):
        each_tile(basis, False)
        if rank_parts > 1:
            basis = torch.linalg.qr(grown.sum(0)).Q.contiguous()
        else:
            launch(
                _orthonormal_kernel, (owners,), grown, basis, owners, rank, splits,
                HEAD_DIM=head_dim, DIM=width, RANK=_STEP, num_warps=4,
            )  # fmt: skip
    # so that the error is that of a projection onto what is stored
    right = basis.view(batch, kv_heads, head_dim, rank).to(dtype)
    each_tile(right.float(), True)
    return left, right


def _tile(block: int, bits: int, width: int) -> TileShape:
    return tile_shape(block, [bits], max(16, _TILE // width))


def _warps(width: int) -> int:
    return 8 if width > 128 else 4


# numbers of a residual's tile
_TILE = 2048
# directions of a program
_STEP = MIN_SIDE


@triton.jit(do_not_specialize=["owners", "blocks", "rank_parts", "splits", "split_tiles", "tiles"])
def _residual_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, outlier_values_ptr, outlier_index_ptr,
    present_ptr, basis_ptr, left_ptr, grown_ptr,
    x_batch_stride, x_head_stride, x_block_stride, x_stride, batch_blocks, head_blocks,
    owners, kv_heads, blocks, rank, rank_parts, splits, split_tiles, tiles,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    OUTLIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    RUN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK_STEP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    # one program owns RANK_STEP directions of one (row, KV head), and the blocks of one split
    split = tl.program_id(0) % splits
    first = tl.program_id(0) // splits % rank_parts * RANK_STEP
    owner = (tl.program_id(0) // splits // rank_parts).to(tl.int64)
    batch = owner // kv_heads
    head = owner % kv_heads
    x_ptr += batch * x_batch_stride + head * x_head_stride
    base = batch * batch_blocks + head * head_blocks

    dim = tl.arange(0, DIM)
    direction = first + tl.arange(0, RANK_STEP)
    basis_ok = (dim < HEAD_DIM)[:, None] & (direction < rank)[None, :]
    basis_at = (owner * HEAD_DIM + dim)[:, None] * rank + direction[None, :]
    basis = tl.load(basis_ptr + basis_at, mask=basis_ok, other=0.0)  # [D, rank]
    grown = tl.zeros([DIM, RANK_STEP], tl.float32)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tiles)):
        block, offset = tile_start(tile, BLOCK, PLANES, RUN, TILE_BLOCKS)
        ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)
        at = (block + ahead).to(tl.int64)
        ok = at < blocks
        if MASKED:
            present = tl.load(present_ptr + batch * blocks + at, mask=ok, other=0) != 0
        else:
            present = ok
        x_at = at * x_block_stride + place * x_stride
        x_ok = present[:, None] & (dim < HEAD_DIM)[None, :]
        x = tl.load(x_ptr + x_at[:, None] + dim[None, :], mask=x_ok, other=0.0).to(tl.float32)
        decoded = load_decoded(
            codes_ptr, scales_ptr, zeros_ptr, outlier_values_ptr, outlier_index_ptr, base, block, blocks, offset,
            BITS, GROUP, PER_CHANNEL, OUTLIERS, CENTRED, HEAD_DIM, DIM, BLOCK, PLANES, RUN, TILE_BLOCKS,
        )  # fmt: skip
        residual = tl.where(x_ok, x - decoded, 0.0)  # [T, D]
        seen = dot(residual, basis, tl.zeros([residual.shape[0], RANK_STEP], tl.float32))  # [T, rank]
        if grown_ptr is None:
            left_at = ((owner * blocks + at) * BLOCK + place)[:, None] * rank + direction[None, :]
            left_ok = ok[:, None] & (direction < rank)[None, :]
            tl.store(left_ptr + left_at, seen.to(left_ptr.dtype.element_ty), mask=left_ok)
        else:
            grown = dot(tl.trans(residual), seen, grown)
    if grown_ptr is not None:
        tl.store(grown_ptr + wide(split) * owners * HEAD_DIM * rank + basis_at, grown, mask=basis_ok)


@triton.jit(do_not_specialize=["owners", "splits"])
def _orthonormal_kernel(
    grown_ptr, basis_ptr,  # [splits, owners, HEAD_DIM, rank] and, of its sum, [owners, HEAD_DIM, rank]
    owners, rank, splits,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    # one program owns the directions of one (row, KV head)
    owner = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    direction = tl.arange(0, RANK)
    ok = (dim < HEAD_DIM)[:, None] & (direction < rank)[None, :]
    at = (owner * HEAD_DIM + dim)[:, None] * rank + direction[None, :]
    basis = tl.zeros([DIM, RANK], tl.float32)
    for split in range(splits):
        basis += tl.load(grown_ptr + wide(split) * owners * HEAD_DIM * rank + at, mask=ok, other=0.0)
    # the squares of small remainders must not underflow
    largest = tl.max(tl.max(tl.abs(basis), 1), 0)
    basis = basis * tl.where(largest > 0, 1.0 / largest, 0.0)
    for n in range(rank):
        one = tl.sum(tl.where(direction[None, :] == n, basis, 0.0), 1)  # [D]
        # twice: what remains of a direction that depends on the others is noise, and not orthogonal to them
        for _ in tl.static_range(2):
            share = tl.sum(basis * one[:, None], 0)  # [rank]
            share = tl.where(direction < n, share, 0.0)
            one -= tl.sum(basis * share[None, :], 1)
            length = tl.sqrt(tl.sum(one * one, 0))
            one = one * tl.where(length > 0, 1.0 / length, 0.0)
        basis = tl.where(direction[None, :] == n, one[:, None], basis)
    tl.store(basis_ptr + at, basis, mask=ok)


def aot_calls() -> None:
    for head_dim, block, bits, group, outliers, dtype in (
        (64, 64, 2, 64, 1, torch.bfloat16),
        (80, 64, 3, 32, 1, torch.float32),
        (128, 64, 2, 64, 2, torch.bfloat16),
        (128, 64, 4, 64, 0, torch.bfloat16),
        (128, 16, 8, 16, 1, torch.float32),
        (256, 64, 2, 64, 3, torch.bfloat16),
        (256, 128, 3, 32, 3, torch.float32),
    ):
        for axis in get_args(Axis):
            x, coding = shaped(2, 8, 5, block, head_dim, dtype=dtype), QuantScheme(bits, group, axis, outliers)
            residual_factors(x, empty_packed(x, coding), coding, 4, shaped(2, 5, dtype=torch.bool))
