"""How packed keys and values are stored: the scheme, the tensors, and their codes (kernels/quantise.py says why)."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kvcompress.kernels.common.tile import tile_width

Axis = Literal["channel", "token"]
Zeros = Literal["group", "block", "none"]
Keeps = Literal["numbers", "spread", "slope"]


class QuantScheme(NamedTuple):
    """How one tensor is packed.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group: numbers that share a scale and a zero, a power of two, at least 8; at most the whole vector.
        axis: "channel": a group is `group` consecutive tokens of a channel (keys); "token": `group` consecutive
            channels of a token (values).
        outliers: numbers that leave each vector at either end.
        rank: of the low-rank factors.
        zeros: what a code is added to: "group": a zero of each group, its minimum; "none": nothing, codes stand for
            levels around 0; "block": so do they, around the mean of the channel over the block. The last two are for
            groups of whole tokens.
        keeps: what scales are chosen for (kernels/quantise.py). "numbers": that each is near; "spread": that those of a
            group vary as much as they did (keys); "slope": that they are right where many are averaged (values).
    """

    bits: int
    group: int
    axis: Axis
    outliers: int = 0
    rank: int = 0
    zeros: Zeros = "group"
    keeps: Keeps = "numbers"

    @property
    def middle(self) -> float:
        """What stands for 0 where codes stand for levels around it."""
        return ((1 << self.bits) - 1) / 2

    def groups(self, block: int, head_dim: int) -> tuple[int, int]:
        """The last two sizes of scales and zeros."""
        if self.axis == "channel":
            return block // min(self.group, block), head_dim
        return block, -(-head_dim // self.group)

    def bytes(self, block: int, head_dim: int) -> int:
        """Bytes of one packed block of one KV head, without its basis `right`, which many blocks may share."""
        groups, vectors = self.groups(block, head_dim), head_dim if self.axis == "channel" else block
        codes = block * self.bits // 8 * head_dim
        zeros = {"group": groups[0] * groups[1], "block": head_dim, "none": 0}[self.zeros]
        of_outlier = 2 + index_dtype(self, head_dim).itemsize
        sparse = 2 * self.outliers * vectors * of_outlier
        return codes + 2 * (groups[0] * groups[1] + zeros) + sparse + 2 * block * self.rank


# keys that are not packed, beside values that are: `QuantizedTensor.codes` are the numbers, [batch, kv_heads, blocks,
# block, head_dim]
PLAIN = QuantScheme(16, 256, "token")


class QuantizedTensor(NamedTuple):
    """Blocks of tokens as `quantise` packs them; every block is independent of the others.

    Attributes:
        codes: [batch, kv_heads, blocks, block * bits / 8, head_dim] uint8, see `pack_codes`.
        scales, zeros: float16, [batch, kv_heads, blocks, block / group, head_dim] (axis "channel") or
            [batch, kv_heads, blocks, block, ceil(head_dim / group)] (axis "token"). Zeros of a whole block are
            [batch, kv_heads, blocks, 1, head_dim]; None: there are none.
        outlier_values: float16, [batch, kv_heads, blocks, 2 * outliers, head_dim] or
            [batch, kv_heads, blocks, block, 2 * outliers]: what to add to the decoded number. None: no outliers.
        outlier_index: uint8, of the same shape: the token within the block, or the channel; int16 where there are more
            than 256 channels.
        left: float16 [batch, kv_heads, blocks, block, rank]. None: no low-rank term.
        right: float16 [batch, kv_heads, spans, head_dim, rank]: left @ right^T is added; blocks share a basis.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    outlier_values: Tensor | None = None
    outlier_index: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def of_blocks(self, blocks: slice) -> "QuantizedTensor":
        """Views of some blocks; the bases stay."""
        parts: list[Any] = [None if part is None else part[:, :, blocks] for part in self[:6]]
        return QuantizedTensor._make([*parts, self.right])


def block_of(packed: QuantizedTensor, coding: QuantScheme) -> int:
    """Tokens of a block."""
    rows = packed.codes.shape[3]
    return rows if coding == PLAIN else rows * 8 // coding.bits


# channels that an index of 16 bits can tell apart
_MOST_CHANNELS = 2**15


def index_dtype(coding: QuantScheme, head_dim: int) -> torch.dtype:
    """The dtype of an outlier's index: a byte for one of up to 256 numbers."""
    return torch.int16 if coding.axis == "token" and head_dim > 256 else torch.uint8


def check_coding(coding: QuantScheme, block: int, head_dim: int) -> None:
    """Raises ValueError where such a block cannot be packed."""
    if coding.bits not in (2, 3, 4, 8):
        raise ValueError(f"codes have 2, 3, 4 or 8 bits, got {coding.bits}")
    if coding.axis not in ("channel", "token"):
        raise ValueError(f'axis must be "channel" or "token", got {coding.axis!r}')
    if not 8 <= block <= 256 or block & (block - 1):
        raise ValueError(f"a block has a power of two of tokens, 8 to 256, got {block}")
    if coding.group < 8 or coding.group & (coding.group - 1):
        raise ValueError(f"group must be a power of two from 8 on, got {coding.group}")
    if not 1 <= head_dim <= _MOST_CHANNELS:
        raise ValueError(
            f"head_dim must be 1 to {_MOST_CHANNELS} to be packed, as the index of an outlier has 16 bits, got "
            f"{head_dim}; use a cache that keeps keys and values as they come"
        )
    if coding.zeros not in get_args(Zeros):
        raise ValueError(f"zeros must be one of {', '.join(get_args(Zeros))}, got {coding.zeros!r}")
    is_token = coding.axis == "token" and coding.group >= head_dim
    if coding.zeros != "group" and (not is_token or coding.outliers or coding.bits > 4):
        raise ValueError(
            f"zeros={coding.zeros!r} is for whole tokens, up to 4 bits and no outliers, got groups of {coding.group} "
            f"along the {coding.axis} of {head_dim} channels, {coding.bits} bits and {coding.outliers} outliers"
        )
    if coding.keeps not in get_args(Keeps) or (coding.keeps != "numbers" and coding.outliers):
        raise ValueError(
            f"keeps must be one of {', '.join(get_args(Keeps))}, and with outliers numbers, got {coding.keeps!r} and "
            f"{coding.outliers} outliers"
        )
    length = block if coding.axis == "channel" else head_dim
    if not 0 <= 2 * coding.outliers <= length:
        raise ValueError(
            f"outliers leave a vector of {length} at both ends, at most {length // 2}, got {coding.outliers}"
        )


def empty_packed(x: Tensor, coding: QuantScheme) -> QuantizedTensor:
    """Empty tensors for what `quantise` makes of these blocks."""
    batch, kv_heads, blocks, block, head_dim = x.shape
    shape = (batch, kv_heads, blocks)
    codes = x.new_empty(*shape, block * coding.bits // 8, head_dim, dtype=torch.uint8)
    scales = x.new_empty(*shape, *coding.groups(block, head_dim), dtype=torch.float16)
    zeros = {"group": scales, "block": x[..., :1, :], "none": None}[coding.zeros]
    zeros = None if zeros is None else zeros.new_empty(zeros.shape, dtype=torch.float16)
    if not coding.outliers:
        return QuantizedTensor(codes, scales, zeros)
    count = 2 * coding.outliers
    sparse = (*shape, count, head_dim) if coding.axis == "channel" else (*shape, block, count)
    values, index = (x.new_empty(sparse, dtype=dtype) for dtype in (torch.float16, index_dtype(coding, head_dim)))
    return QuantizedTensor(codes, scales, zeros, values, index)


def stored_blocks(packed: QuantizedTensor) -> tuple[QuantizedTensor, int, int]:
    """The packed tensors as kernels address them: each block is contiguous, and the blocks follow one another.

    Returns:
        The tensors, and how many blocks lie between rows and between heads. Slices of a larger storage are taken as
        they are, other layouts are copied; the factor `right` is passed through.
    """
    parts = [part for part in packed[:6] if part is not None]
    strides = {(part.stride(0) / part[0, 0, 0].numel(), part.stride(1) / part[0, 0, 0].numel()) for part in parts}
    if len(strides) == 1 and all(part[0, 0].is_contiguous() for part in parts):
        (steps,) = strides
        return packed, int(steps[0]), int(steps[1])
    copied = (None if part is None else part.contiguous() for part in packed)
    return QuantizedTensor(*copied), packed.codes.shape[1] * packed.codes.shape[2], packed.codes.shape[2]  # type: ignore[arg-type]


def coding_constants(coding: QuantScheme, packed: QuantizedTensor, block: int, head_dim: int) -> dict[str, int | bool]:
    """The compile-time arguments of a kernel that decodes."""
    per_channel = coding.axis == "channel"
    return {
        "BITS": coding.bits,
        "GROUP": min(coding.group, block if per_channel else tile_width(head_dim)),
        "PER_CHANNEL": per_channel,
        "OUTLIERS": 0 if packed.outlier_index is None else coding.outliers,
        "CENTRED": coding.zeros != "group",
    }


def nearest_codes(x: Tensor, coding: QuantScheme) -> Tensor:
    """The codes whose levels around 0 are nearest to x, in its dtype; of two as near the larger."""
    return (x + coding.middle + 0.5).floor_().clamp_(0, 2**coding.bits - 1)


def spread_groups(groups: Tensor, coding: QuantScheme, x: Tensor) -> Tensor:
    """What a group has, [..., groups], for each of its numbers, broadcastable to x."""
    block, head_dim = x.shape[-2:]
    if coding.axis == "channel":
        group = min(coding.group, block)
        return groups if group == block else groups.repeat_interleave(group, -2)
    return groups if groups.shape[-1] == 1 else groups.repeat_interleave(coding.group, -1)[..., :head_dim]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the tokens of a block, without interleaving.

    With rows = block * bits / 8 for 2, 4 and 8 bits, the bits of row r from j * bits on hold the code of token
    r + j * rows. Codes of 3 bits are two such planes, one below the other: their low 2 bits, then their high bit.

    Args:
        codes: [..., block, head_dim] uint8, below 2^bits.

    Returns:
        [..., block * bits / 8, head_dim] uint8.
    """
    if bits == 3:
        return torch.cat([_pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)], -2)
    return _pack_plane(codes, bits)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The codes of `pack_codes`, [..., block, head_dim] uint8."""
    if bits == 3:
        rows = packed.shape[-2] // 3
        low, high = _unpack_plane(packed[..., : 2 * rows, :], 2), _unpack_plane(packed[..., 2 * rows :, :], 1)
        # the high bit as 4, in one pass
        return low.add_(high, alpha=4)
    return _unpack_plane(packed, bits)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    per = 8 // bits
    if per == 1:
        return codes.contiguous()
    planes = codes.unflatten(-2, (per, -1))
    packed: Tensor = planes[..., 0, :, :].clone(memory_format=torch.contiguous_format)
    for j in range(1, per):
        packed |= planes[..., j, :, :] << (j * bits)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    flat = packed.flatten(-2)
    mask, words = 2**bits - 1, flat
    if not any(size % 8 for size in (flat.shape[-1], flat.storage_offset(), *flat.stride()[:-1])):
        # eight bytes at a time: the mask removes what a shift brings in from the byte above
        mask, words = mask * 0x0101010101010101, flat.view(torch.int64)
    shifts = torch.arange(0, 8, bits, dtype=words.dtype, device=words.device)
    codes = (words[..., None, :] >> shifts[:, None]).bitwise_and_(mask).view(torch.uint8)
    return codes.view(*packed.shape[:-2], 8 // bits * packed.shape[-2], packed.shape[-1])
