"""Device functions for packed blocks: decoding a tile in registers, and multiplying by its low-rank factors.

A tile has the tokens of one or several whole blocks in order, or a part of one block: from each of its PLANES planes
(stretches of BLOCK / PLANES tokens, whose codes lie in the same rows) RUN tokens from the same offset on. Keys and
values packed at different bits have tiles of the same tokens when both use the larger PLANES.
"""

from typing import NamedTuple

from kvcompress.kernels.common.runtime import tl, triton
from kvcompress.kernels.common.tile import dot


class TileShape(NamedTuple):
    """Which tokens a tile has: those of `blocks` blocks, of each plane `run`."""

    block: int
    planes: int
    run: int
    blocks: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.planes * self.run

    def count(self, blocks: int) -> int:
        """How many tiles cover so many blocks."""
        return -(-blocks // self.blocks) * (self.block // self.planes // self.run)

    def constants(self) -> dict[str, int]:
        return {"BLOCK": self.block, "PLANES": self.planes, "RUN": self.run, "TILE_BLOCKS": self.blocks}


def tile_shape(block: int, bits: list[int], tokens: int) -> TileShape:
    """A tile of so many tokens, a power of two, of blocks that are packed at these bits."""
    planes = max(planes_of(width) for width in bits)
    plane = block // planes
    run = min(plane, max(1, tokens // planes))
    return TileShape(block, planes, run, max(1, tokens // block) if run == plane else 1)


def planes_of(bits: int) -> int:
    """Planes whose codes share a byte; of 3-bit codes, their low 2 bits do."""
    return 4 if bits == 3 else 8 // bits


@triton.jit
def tile_start(tile, BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    # the first block of a tile, and the offset of its tokens in each plane
    PARTS: tl.constexpr = BLOCK // PLANES // RUN
    return tile // PARTS * TILE_BLOCKS, tile % PARTS * RUN


@triton.jit
def tile_tokens(
    offset, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # of every STEP-th token of a tile its block, counted from the tile's first, and its place in the block
    index = tl.arange(0, TILE_BLOCKS * PLANES * RUN // STEP) * STEP
    return index // (PLANES * RUN), index // RUN % PLANES * (BLOCK // PLANES) + offset + index % RUN


@triton.jit
def load_codes(
    ptr, base, block, blocks, offset, dim,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # the codes of a tile, int32 [tokens, DIM]
    PER: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    ROWS: tl.constexpr = BLOCK * BITS // 8
    SHARE: tl.constexpr = PLANES // PER * RUN
    index = tl.arange(0, TILE_BLOCKS * SHARE)
    row = index % SHARE // RUN * (BLOCK // PLANES) + offset + index % RUN  # [rows]
    at = block + index // SHARE
    ok = (at < blocks)[:, None] & (dim < HEAD_DIM)[None, :]
    start = ptr + (base + at)[:, None] * (ROWS * HEAD_DIM) + dim[None, :]
    packed = tl.load(start + row[:, None] * HEAD_DIM, mask=ok, other=0).to(tl.int32)  # [rows, DIM]
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        packed = tl.reshape(packed, [TILE_BLOCKS, SHARE, DIM])
        codes = tl.permute(tl.join(packed & 15, packed >> 4), [0, 3, 1, 2])  # [blocks, 2, share, DIM]
    else:
        packed = tl.reshape(packed, [TILE_BLOCKS, SHARE, DIM])
        c0 = packed & 3
        c1 = packed >> 2 & 3
        c2 = packed >> 4 & 3
        c3 = packed >> 6
        if BITS == 3:
            high_row = BLOCK // 4 + row % (BLOCK // 8)
            high = tl.load(start + high_row[:, None] * HEAD_DIM, mask=ok, other=0).to(tl.int32)
            high = tl.reshape(high >> (row // (BLOCK // 8))[:, None], [TILE_BLOCKS, SHARE, DIM])
            c0 |= (high & 1) << 2
            c1 |= (high >> 2 & 1) << 2
            c2 |= (high >> 4 & 1) << 2
            c3 |= (high >> 6 & 1) << 2
        # [blocks, share, DIM, 2, 2]: of the last two the first is the higher digit of the plane
        codes = tl.permute(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [0, 3, 4, 1, 2])
    return tl.reshape(codes, [TILE_BLOCKS * PLANES * RUN, DIM])


@triton.jit
def middle(BITS: tl.constexpr):
    # what stands for 0 where codes stand for levels around it
    return (2**BITS - 1) / 2


@triton.jit
def block_means(
    ptr, base, block, blocks, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE_BLOCKS: tl.constexpr
):  # fmt: skip
    # the zeros of a tile's blocks, float32 [blocks, DIM]
    dim = tl.arange(0, DIM)
    at = block + tl.arange(0, TILE_BLOCKS)
    ok = (at < blocks)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(ptr + (base + at)[:, None] * HEAD_DIM + dim[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def token_scales(
    ptr, base, block, blocks, offset, BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # of a tile's tokens the scale, where each has one, float32 [tokens]
    ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)
    return tl.load(ptr + (base + block + ahead) * BLOCK + place, mask=block + ahead < blocks, other=0.0).to(tl.float32)


@triton.jit
def load_decoded(
    codes_ptr, scales_ptr, zeros_ptr, outlier_values_ptr, outlier_index_ptr,
    base, block, blocks, offset,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_CHANNEL: tl.constexpr, OUTLIERS: tl.constexpr, CENTRED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    # what the blocks from `block` of `blocks` on decode to without their low-rank term, float32 [tokens, DIM];
    # the pointers' block `base`, in int64, is block 0
    dim = tl.arange(0, DIM)
    codes = load_codes(
        codes_ptr, base, block, blocks, offset, dim,
        BITS, HEAD_DIM, DIM, BLOCK, PLANES, RUN, TILE_BLOCKS,
    )  # fmt: skip
    codes = codes.to(tl.float32)
    TOKENS: tl.constexpr = TILE_BLOCKS * PLANES * RUN
    if PER_CHANNEL:
        # tokens that follow each other in the tile and share a scale
        STRETCH: tl.constexpr = (
            GROUP if GROUP < (BLOCK if RUN * PLANES == BLOCK else RUN) else (BLOCK if RUN * PLANES == BLOCK else RUN)
        )
        ahead, place = tile_tokens(offset, STRETCH, BLOCK, PLANES, RUN, TILE_BLOCKS)
        row = (base + block + ahead) * (BLOCK // GROUP) + place // GROUP
        ok = (block + ahead < blocks)[:, None] & (dim < HEAD_DIM)[None, :]
        at = row[:, None] * HEAD_DIM + dim[None, :]
        scale = tl.load(scales_ptr + at, mask=ok, other=0.0).to(tl.float32)[:, None, :]
        zero = tl.load(zeros_ptr + at, mask=ok, other=0.0).to(tl.float32)[:, None, :]
        tile = tl.reshape(tl.reshape(codes, [TOKENS // STRETCH, STRETCH, DIM]) * scale + zero, [TOKENS, DIM])
    else:
        GROUPS: tl.constexpr = DIM // GROUP
        STORED: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
        group = tl.arange(0, GROUPS)
        ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)
        row = (base + block + ahead) * BLOCK + place
        ok = (block + ahead < blocks)[:, None] & (group < STORED)[None, :]
        at = row[:, None] * STORED + group[None, :]
        scale = tl.load(scales_ptr + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
        codes = tl.reshape(codes, [TOKENS, GROUPS, GROUP])
        if CENTRED:
            tile = tl.reshape((codes - middle(BITS)) * scale, [TOKENS, DIM])
            if zeros_ptr is not None:
                mean = tl.reshape(
                    block_means(zeros_ptr, base, block, blocks, HEAD_DIM, DIM, TILE_BLOCKS), [TILE_BLOCKS, 1, DIM]
                )
                tile = tl.reshape(tl.reshape(tile, [TILE_BLOCKS, PLANES * RUN, DIM]) + mean, [TOKENS, DIM])
        else:
            zero = tl.load(zeros_ptr + at, mask=ok, other=0.0).to(tl.float32)[:, :, None]
            tile = tl.reshape(codes * scale + zero, [TOKENS, DIM])
    if OUTLIERS:
        ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)
        if PER_CHANNEL:
            place = tl.reshape(place, [TILE_BLOCKS, PLANES * RUN])
            tile = tl.reshape(tile, [TILE_BLOCKS, PLANES * RUN, DIM])
            ahead = tl.arange(0, TILE_BLOCKS)
            ok = (block + ahead < blocks)[:, None] & (dim < HEAD_DIM)[None, :]
            at = (base + block + ahead)[:, None] * (2 * OUTLIERS * HEAD_DIM) + dim[None, :]
            for n in range(2 * OUTLIERS):
                index = tl.load(outlier_index_ptr + at + n * HEAD_DIM, mask=ok, other=0).to(tl.int32)
                value = tl.load(outlier_values_ptr + at + n * HEAD_DIM, mask=ok, other=0.0).to(tl.float32)
                tile += tl.where(place[:, :, None] == index[:, None, :], value[:, None, :], 0.0)
            tile = tl.reshape(tile, [TOKENS, DIM])
        else:
            ok = block + ahead < blocks
            at = ((base + block + ahead) * BLOCK + place) * (2 * OUTLIERS)
            for n in range(2 * OUTLIERS):
                index = tl.load(outlier_index_ptr + at + n, mask=ok, other=0).to(tl.int32)
                value = tl.load(outlier_values_ptr + at + n, mask=ok, other=0.0).to(tl.float32)
                tile += tl.where(dim[None, :] == index[:, None], value[:, None], 0.0)
    return tile  # [tokens, DIM]


@triton.jit
def base_of(spans_ptr, at, ok, SPANNED: tl.constexpr):
    # which basis a block has
    if SPANNED:
        return tl.load(spans_ptr + at, mask=ok, other=0)
    return 0


@triton.jit
def _load_basis(ptr, span, first, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr):
    # directions first .. first + STEP of a basis, [DIM, STEP]
    dim = tl.arange(0, DIM)
    direction = first + tl.arange(0, STEP)
    ok = (dim < HEAD_DIM)[:, None] & (direction < RANK)[None, :]
    return tl.load(ptr + (span * HEAD_DIM + dim)[:, None] * RANK + direction[None, :], mask=ok, other=0.0)


@triton.jit
def _load_left(ptr, at, ok, first, RANK: tl.constexpr, STEP: tl.constexpr):
    # of these tokens the shares of directions first .. first + STEP, [T, STEP]
    direction = first + tl.arange(0, STEP)
    return tl.load(
        ptr + at[:, None] * RANK + direction[None, :], mask=ok[:, None] & (direction < RANK)[None, :], other=0.0
    )


@triton.jit
def add_key_factors(
    logits, query, left_ptr, right_ptr, at, ok, span, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    # logits [R, T] + (query @ right) @ left^T of the tokens at these places
    for first in tl.static_range(0, RANK, 16):
        right = _load_basis(right_ptr, span, first, HEAD_DIM, DIM, RANK, 16).to(query.dtype)
        left = _load_left(left_ptr, at, ok, first, RANK, 16).to(query.dtype)
        seen = dot(query, right, tl.zeros([logits.shape[0], 16], tl.float32)).to(query.dtype)
        logits = dot(seen, tl.trans(left), logits)
    return logits


@triton.jit
def add_value_factors(
    out, weight, left_ptr, right_ptr, at, ok, span, RANK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    # out [R, DIM] + (weight @ left) @ right^T of the tokens at these places
    for first in tl.static_range(0, RANK, 16):
        left = _load_left(left_ptr, at, ok, first, RANK, 16).to(weight.dtype)
        right = _load_basis(right_ptr, span, first, HEAD_DIM, DIM, RANK, 16).to(weight.dtype)
        share = dot(weight, left, tl.zeros([out.shape[0], 16], tl.float32)).to(weight.dtype)
        out = dot(share, tl.trans(right), out)
    return out
