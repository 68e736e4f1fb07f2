"""Quantised keys and values: groups of numbers as 2, 3, 4 or 8-bit codes with a scale and a zero, and outliers apart.

GEAR (arXiv:2403.05527) on KIVI's groups (arXiv:2402.02750): keys share a scale along the tokens of a channel, values
along the channels of a token, because the outliers of keys sit in few channels and those of values do not.

    x ~ zero + scale * code + outlier        levels = 2^bits - 1
    zero = min, scale = (max - zero) / levels, code = round((x - zero) / scale)

Minimum and maximum are of a group's numbers without its outliers: the c largest and the c smallest of each vector (a
channel of a block, a token of a head), kept as the float16 difference to what their own code decodes to. The zero is
rounded down and the scale up to float16, and the codes are computed against the rounded ones, so that no number is
further than scale / 2 from its decoding; a group of one value needs no case of its own. What float16 cannot hold
(beyond 65504) saturates.

Departures from the paper: outliers leave the ranges instead of counting as their vector's mean, which can lie outside
of the range of a group of the rest; the outliers of a value are chosen within each KV head and not over all of them,
so that heads stay independent.

Bytes a block and head: block * head_dim * element size read, block * head_dim * bits / 8 and what scales, zeros and
outliers take (`Coding.bytes`) written, in one pass; some 6 + 6 c operations a number: bound by bandwidth.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_LARGEST = 65504.0


class Coding(NamedTuple):
    """How one tensor is packed.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group: numbers that share a scale and a zero, a power of two from 8 on; no more than the vector has are used.
        axis: "channel": a group is `group` consecutive tokens of a channel (keys); "token": `group` consecutive
            channels of a token (values).
        outliers: numbers that leave each vector at either end.
        rank: of the low-rank factors.
    """

    bits: int
    group: int
    axis: Literal["channel", "token"]
    outliers: int = 0
    rank: int = 0

    def groups(self, block: int, head_dim: int) -> tuple[int, int]:
        """The last two sizes of scales and zeros."""
        if self.axis == "channel":
            return block // min(self.group, block), head_dim
        return block, -(-head_dim // self.group)

    def bytes(self, block: int, head_dim: int) -> int:
        """Bytes of one packed block of one KV head, its basis `right` apart, which many blocks may share."""
        groups, vectors = self.groups(block, head_dim), head_dim if self.axis == "channel" else block
        codes = block * self.bits // 8 * head_dim
        return codes + 4 * groups[0] * groups[1] + 6 * self.outliers * vectors + 2 * block * self.rank


class Packed(NamedTuple):
    """Blocks of tokens as `quantise` packs them; every block is independent of the others.

    Attributes:
        codes: [batch, kv_heads, blocks, block * bits / 8, head_dim] uint8, see `pack_codes`.
        scales, zeros: float16, [batch, kv_heads, blocks, block / group, head_dim] (axis "channel") or
            [batch, kv_heads, blocks, block, ceil(head_dim / group)] (axis "token").
        outlier_values: float16, [batch, kv_heads, blocks, 2 * outliers, head_dim] or
            [batch, kv_heads, blocks, block, 2 * outliers]: what to add to the decoded number. None: no outliers.
        outlier_index: uint8, of the same shape: the token within the block, or the channel.
        left: float16 [batch, kv_heads, blocks, block, rank]. None: no low-rank term.
        right: float16 [batch, kv_heads, spans, head_dim, rank]: left @ right^T is added; blocks share a basis.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    outlier_values: Tensor | None = None
    outlier_index: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def quantise(x: Tensor, coding: Coding) -> Packed:
    """Packs whole blocks of keys or values.

    Args:
        x: [batch, kv_heads, blocks, block, head_dim], any floating dtype; block is a power of two, 8 to 256.
        coding: its rank is not looked at: the factors are `residual_factors`' business.

    Returns:
        The packed tensors, left and right None.

    Raises:
        ValueError: for a block, head_dim or coding that cannot be packed.
    """
    check_coding(coding, x.shape[-2], x.shape[-1])
    return quantise_reference(x, coding)


def quantise_reference(x: Tensor, coding: Coding) -> Packed:
    """What quantise means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    x = x.float()
    dim = -2 if coding.axis == "channel" else -1
    low = high = x
    index = None
    if coding.outliers:
        index = _outlier_index(x, coding.outliers, dim)
        is_outlier = torch.zeros_like(x, dtype=torch.bool).scatter_(dim, index, True)
        low, high = x.masked_fill(is_outlier, torch.inf), x.masked_fill(is_outlier, -torch.inf)
    low, high = _group(low, coding, torch.inf).amin(-1), _group(high, coding, -torch.inf).amax(-1)
    # a group of nothing but outliers
    empty = low > high
    low, high = (bound.clamp(-_LARGEST, _LARGEST).masked_fill(empty, 0.0) for bound in (low, high))
    zeros = _round_down(low)
    levels = 2**coding.bits - 1
    scales = -_round_down(-((high - zeros.float()) / levels))
    steps = scales.float()
    inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    spread = _spread(torch.stack([zeros.float(), steps, inverse]), coding, x)
    codes = ((x - spread[0]) * spread[2] + 0.5).floor_().clamp_(0, levels)
    values = None
    if index is not None:
        rest = x - (spread[0] + spread[1] * codes)
        values = rest.gather(dim, index).clamp_(-_LARGEST, _LARGEST).half()
        index = index.to(torch.uint8)
    return Packed(pack_codes(codes.to(torch.uint8), coding.bits), scales, zeros, values, index)


def dequantise(
    packed: Packed, coding: Coding, dtype: torch.dtype = torch.float32, spans: Tensor | None = None
) -> Tensor:
    """The tensor that packed blocks stand for, sparse and low-rank terms included, in plain PyTorch.

    Args:
        dtype: of the result; computed in float32.
        spans: [batch, blocks] int32, the basis of each block. None: all have the first.

    Returns:
        [batch, kv_heads, blocks, block, head_dim].
    """
    x = unpack_codes(packed.codes, coding.bits).float()
    # both are spread at once
    scales, zeros = _spread(torch.stack([packed.scales.float(), packed.zeros.float()]), coding, x)
    x.mul_(scales).add_(zeros)
    if packed.outlier_values is not None and packed.outlier_index is not None:
        dim = -2 if coding.axis == "channel" else -1
        x.scatter_add_(dim, packed.outlier_index.long(), packed.outlier_values.float())
    if packed.left is not None and packed.right is not None:
        if spans is None:
            right = packed.right[:, :, :1]
        else:
            batch = torch.arange(len(x), device=x.device)[:, None]
            right = packed.right.transpose(1, 2)[batch, spans.long()].transpose(1, 2)
        x += packed.left.float() @ right.float().mT
    return x.to(dtype)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the tokens of a block, without interleaving.

    With rows = block * bits / 8 for 2, 4 and 8 bits, bits j * bits and on of row r hold the code of token r + j * rows.
    Codes of 3 bits are two such planes one below the other: their low 2 bits, then their high bit.

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
        return low.bitwise_or_(high.bitwise_left_shift_(2))
    return _unpack_plane(packed, bits)


def check_coding(coding: Coding, block: int, head_dim: int) -> None:
    """Raises ValueError where such a block cannot be packed."""
    if coding.bits not in (2, 3, 4, 8):
        raise ValueError(f"codes have 2, 3, 4 or 8 bits, got {coding.bits}")
    if coding.axis not in ("channel", "token"):
        raise ValueError(f'axis must be "channel" or "token", got {coding.axis!r}')
    if not 8 <= block <= 256 or block & (block - 1):
        raise ValueError(f"a block has a power of two of tokens, 8 to 256, got {block}")
    if coding.group < 8 or coding.group & (coding.group - 1):
        raise ValueError(f"group must be a power of two from 8 on, got {coding.group}")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim must be 1 to 256, as the index of an outlier is a byte, got {head_dim}")
    length = block if coding.axis == "channel" else head_dim
    if not 0 <= 2 * coding.outliers <= length:
        raise ValueError(
            f"outliers leave a vector of {length} at both ends, at most {length // 2}, got {coding.outliers}"
        )


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    per = 8 // bits
    planes = codes.unflatten(-2, (per, -1))
    packed = planes[..., 0, :, :].clone(memory_format=torch.contiguous_format)
    for j in range(1, per):
        packed |= planes[..., j, :, :] << (j * bits)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    per = 8 // bits
    codes = packed.new_empty(*packed.shape[:-2], per, *packed.shape[-2:])
    for j in range(per):
        plane = codes[..., j, :, :]
        torch.bitwise_right_shift(packed, j * bits, out=plane)
        if j < per - 1:
            plane &= 2**bits - 1
    return codes.flatten(-3, -2)


def _outlier_index(x: Tensor, outliers: int, dim: int) -> Tensor:
    """Of each vector the `outliers` largest, then the smallest; the first of equals, and none twice."""
    rest = x.clone()
    found = []
    for _ in range(outliers):
        found.append(rest.argmax(dim, keepdim=True))
        rest.scatter_(dim, found[-1], -torch.inf)
    rest.masked_fill_(rest == -torch.inf, torch.inf)
    for _ in range(outliers):
        found.append(rest.argmin(dim, keepdim=True))
        rest.scatter_(dim, found[-1], torch.inf)
    return torch.cat(found, dim)


def _group(x: Tensor, coding: Coding, fill: float) -> Tensor:
    """[..., block, head_dim] with the numbers of a group as the last dimension, behind those of scales and zeros."""
    block, head_dim = x.shape[-2:]
    if coding.axis == "channel":
        return x.unflatten(-2, (-1, min(coding.group, block))).transpose(-1, -2)
    short = -head_dim % coding.group
    if short:
        x = torch.nn.functional.pad(x, (0, short), value=fill)
    return x.unflatten(-1, (-1, coding.group))


def _spread(groups: Tensor, coding: Coding, x: Tensor) -> Tensor:
    """What a group has, [..., groups], for each of its numbers, broadcastable to x."""
    block, head_dim = x.shape[-2:]
    if coding.axis == "channel":
        group = min(coding.group, block)
        return groups if group == block else groups.repeat_interleave(group, -2)
    return groups if groups.shape[-1] == 1 else groups.repeat_interleave(coding.group, -1)[..., :head_dim]


def _round_down(x: Tensor) -> Tensor:
    """float32 as float16, never above it."""
    half = x.half()
    # of a positive number the one before it, of a negative one the one behind it; below 0 is the least negative
    bits = half.view(torch.int16)
    below = torch.where(half > 0, bits - 1, torch.where(half == 0, -0x7FFF, bits + 1)).view(torch.float16)
    return torch.where(half.float() > x, below, half)
