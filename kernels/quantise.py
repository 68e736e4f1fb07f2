"""Quantised keys and values: groups of numbers as 2-, 3-, 4- or 8-bit codes, a scale and a zero, and outliers apart.

GEAR (arXiv:2403.05527) on KIVI's groups (arXiv:2402.02750): keys share a scale along the tokens of a channel, values
along the channels of a token, because the outliers of keys sit in few channels and those of values do not.

    x ~ zero + scale * code + outlier        levels = 2^bits - 1
    zero = min, scale = (max - zero) / levels, code = round((x - zero) / scale)

Minimum and maximum are of a group's numbers without its outliers: the c largest and the c smallest of each vector (a
channel of a block, a token of a head), kept as their float16 difference from what their code decodes to. The zero is
rounded down and the scale up to float16, and the codes are computed against the rounded ones, so that no number is
further than scale / 2 from its decoded value; a constant group needs no special case. What float16 cannot hold
(beyond 65504) saturates.

Numbers that have been rotated (kernels/hadamard.py) are nearly normally distributed, and need no zeros: their codes
stand for levels around 0, or around the mean of the channel over the block (`QuantScheme.zeros`), and the scale is
fitted:

    x ~ zero + scale * level        level = code - levels / 2        scale = sum x * level / sum level^2

three times, each for the levels that are nearest by the scale before.

Such scales bring each number near, and all of them off: those that were fitted make numbers smaller (of normal ones in
2 bits the slope of what is decoded is 0.88), and a range's make them vary more, by scale^2 / 12. Attention takes exp of
sums of keys and averages values, where noise fades and such faults do not. So, with the codes as they are, `keeps` sets
scales anew, of numbers and levels less their means where a group has a zero, which moves along:

    "spread"  scale = sqrt(sum x^2 / sum level^2)       decoded numbers vary as theirs do: for keys
    "slope"   scale = sum x^2 / sum x * level           E[decoded | x] = x: for values

Departures from the paper: outliers leave the ranges instead of counting as their vector's mean, which can lie outside
the range of what remains of a group; the outliers of a value are chosen within each KV head and not over all of them,
so that heads stay independent.

Bytes per block and head: block * head_dim * element size read, block * head_dim * bits / 8 and what scales, zeros and
outliers take (`QuantScheme.bytes`) written, in one pass, and one more before it for means of blocks; about 6 + 6 c
operations per number: bound by bandwidth.
"""

from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor

from kvcompress.kernels.common.packed_tile import planes_of
from kvcompress.kernels.common.quantized import (
    PLAIN,
    Axis,
    Keeps,
    QuantizedTensor,
    QuantScheme,
    check_coding,
    empty_packed,
    index_dtype,
    nearest_codes,
    pack_codes,
    spread_groups,
    unpack_codes,
)
from kvcompress.kernels.common.runtime import attends_in_triton, launch, op, shaped, tl, triton
from kvcompress.kernels.common.tile import tile_width

_LARGEST = 65504.0
# the least positive number of float16
_LEAST = 2.0**-24
# by bits, a scale to begin with, in root mean squares of a group: what loses least of normally distributed numbers
FIRST_SCALES = {2: 0.9957, 3: 0.586, 4: 0.3352}
# the most that a group of numbers may be shifted by the rounding of its zero, in scales
_SHIFT = 1 / 16
# how often a scale is fitted to the levels that are nearest
FITS = 3


@op(fake=lambda x, coding: empty_packed(x, coding))
def quantise(x: Tensor, coding: QuantScheme) -> QuantizedTensor:
    """Packs whole blocks of keys or values. A group that holds a number that is not finite decodes to NaN.

    Args:
        x: [batch, kv_heads, blocks, block, head_dim], any floating dtype; block is a power of two, 8 to 256.
        coding: its rank is ignored: the factors come from `residual_factors`.

    Returns:
        The packed tensors, left and right None.

    Raises:
        ValueError: for a block, head_dim or coding that cannot be packed.
    """
    check_coding(coding, x.shape[-2], x.shape[-1])
    pieces = blocks_apart(x)
    is_launched = attends_in_triton(x) and x.numel() > 0
    if len(pieces) == 1 and not is_launched:
        return quantise_reference(x, coding)
    packed = empty_packed(x, coding)
    if is_launched:
        _launch(x, coding, packed)
        return packed
    # some blocks at a time: what the reference computes in float32 is a multiple of them
    for piece in pieces:
        for part, some in zip(packed, quantise_reference(x[:, :, piece], coding), strict=True):
            if part is not None and some is not None:
                part[:, :, piece] = some
    return packed


def quantise_reference(x: Tensor, coding: QuantScheme) -> QuantizedTensor:
    """What quantise means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    x = x.float()
    index, unknown = None, None
    low, high = (x, x) if coding.zeros != "group" or coding.outliers else _bounds(x, x, coding)
    # what is not finite is no bound that float16 holds
    if low is x or x.is_cuda or not bool((torch.maximum(high, -low) <= _LARGEST).all()):
        # it cannot be ordered: it makes its group NaN, and counts as 0 otherwise
        unknown = x - x
        x = x.nan_to_num(0.0, 0.0, 0.0)
        if coding.zeros != "group":
            return _centred(x, unknown, coding)
        low = high = x
        dim = -2 if coding.axis == "channel" else -1
        if coding.outliers:
            index = _outlier_index(x, coding.outliers, dim)
            low, high = x.scatter(dim, index, torch.inf), x.scatter(dim, index, -torch.inf)
        low, high = _bounds(low, high, coding)
        # a group that has only outliers
        empty = low > high
        low, high = (bound.clamp(-_LARGEST, _LARGEST).masked_fill(empty, 0.0) for bound in (low, high))
    zeros = _round_down(low)
    levels = 2**coding.bits - 1
    # by a tensor: instead of dividing by a number, CUDA multiplies by its inverse, which rounds differently
    scales = _round_up((high - zeros.float()) / torch.full_like(high, levels))
    steps = scales.float()
    if unknown is None:
        # of a group without range all are the zero, whatever they are multiplied by
        inverse = steps.clamp(min=_LEAST).reciprocal_()
    else:
        inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    lowest, steps, inverse = _spread([zeros.float(), steps, inverse], coding, x)
    codes = (x - lowest).mul_(inverse).add_(0.5).clamp_(0, levels).to(torch.uint8)
    if coding.keeps != "numbers":
        scales, zeros = _kept(x, codes, scales, zeros, coding)
    values = None
    if index is not None:
        rest = x - (lowest + steps * codes)
        values = rest.gather(dim, index).clamp_(-_LARGEST, _LARGEST).half()
        index = index.to(index_dtype(coding, x.shape[-1]))
    if unknown is not None:
        zeros = zeros + _group(unknown, coding, 0.0).sum(-1).half()
    return QuantizedTensor(pack_codes(codes, coding.bits), scales, zeros, values, index)


def _centred(x: Tensor, unknown: Tensor, coding: QuantScheme) -> QuantizedTensor:
    """`quantise_reference` of numbers that are coded around 0 or the mean of a channel."""
    zeros = None
    if coding.zeros == "block":
        zeros = x.mean(-2, keepdim=True).clamp_(-_LARGEST, _LARGEST).half()
        x = x - zeros.float()
    grouped, real = _group(x, coding, 0.0), _group(torch.ones_like(x[:1, :1, :1, :1]), coding, 0.0)
    scales = (grouped.square().sum(-1) / real.sum(-1)).sqrt().mul(FIRST_SCALES[coding.bits]).half()
    for fit in range(FITS + 1):
        steps = scales.float()[..., None]
        codes = nearest_codes(grouped * torch.where(steps > 0, 1.0 / steps, 0.0), coding)
        if fit < FITS:
            levels = (codes - coding.middle) * real
            # never zero: no level is
            scales = ((grouped * levels).sum(-1) / levels.square().sum(-1)).clamp_(0.0, _LARGEST).half()
    if coding.keeps != "numbers":
        scales = _kept_scales(grouped, (codes - coding.middle) * real, scales, coding)
    codes = codes.flatten(-2)[..., : x.shape[-1]].to(torch.uint8)
    scales = scales + _group(unknown, coding, 0.0).sum(-1).half()
    return QuantizedTensor(pack_codes(codes, coding.bits), scales, zeros)


def _kept(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, coding: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scales and zeros of groups that keep what the coding says, for these codes."""
    real = _group(torch.ones_like(x[:1, :1, :1, :1]), coding, 0.0) if coding.axis == "token" else None
    of_x, of_codes = _group(x, coding, 0.0), _group(codes.float(), coding, 0.0)
    count = of_x.shape[-1] if real is None else real.sum(-1)
    means = [part.sum(-1) / count for part in (of_x, of_codes)]
    of_x, of_codes = (part - mean[..., None] for part, mean in zip((of_x, of_codes), means, strict=True))
    if real is not None:
        of_x, of_codes = of_x * real, of_codes * real
    found = _kept_scales(of_x, of_codes, scales, coding)
    exact = means[0] - found.float() * means[1]
    moved = exact.clamp(-_LARGEST, _LARGEST).half()
    # else what float16 rounds from a zero far off would shift all numbers of a group
    fine = (moved.float() - exact).abs() <= found.float() * _SHIFT
    return torch.where(fine, found, scales), torch.where(fine, moved, zeros)


def _kept_scales(x: Tensor, levels: Tensor, scales: Tensor, coding: QuantScheme) -> Tensor:
    """The scales that keep what the coding says of groups [..., group]; as they were where all x are alike."""
    squares, products = x.square().sum(-1), (x * levels).sum(-1)
    found = squares / products if coding.keeps == "slope" else (squares / levels.square().sum(-1)).sqrt()
    return torch.where(products > 0, found.clamp(0.0, _LARGEST).half(), scales)


def dequantise(
    packed: QuantizedTensor, coding: QuantScheme, dtype: torch.dtype = torch.float32, spans: Tensor | None = None
) -> Tensor:
    """The tensor that packed blocks stand for, sparse and low-rank terms included, in plain PyTorch.

    Args:
        dtype: of the result; computed in float32.
        spans: [batch, blocks] int32, the basis of each block. None: all have the first.

    Returns:
        [batch, kv_heads, blocks, block, head_dim].
    """
    if coding == PLAIN:
        return packed.codes.to(dtype)
    x = unpack_codes(packed.codes, coding.bits).float()
    if coding.zeros == "group":
        assert packed.zeros is not None
        scales, zeros = _spread([packed.scales.float(), packed.zeros.float()], coding, x)
        x.mul_(scales).add_(zeros)
    else:
        x.sub_(coding.middle).mul_(spread_groups(packed.scales.float(), coding, x))
        x = x if packed.zeros is None else x.add_(packed.zeros.float())
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


def _outlier_index(x: Tensor, outliers: int, dim: int) -> Tensor:
    """The `outliers` largest of each vector, then its smallest; the first of equals, and none twice."""
    rest, found = x.clone(), []
    for _ in range(outliers):
        found.append(rest.max(dim, keepdim=True).indices)
        rest.scatter_(dim, found[-1], -torch.inf)
    for largest in found[:outliers]:
        rest.scatter_(dim, largest, torch.inf)
    for _ in range(outliers):
        found.append(rest.min(dim, keepdim=True).indices)
        rest.scatter_(dim, found[-1], torch.inf)
    return torch.cat(found, dim)


def _group(x: Tensor, coding: QuantScheme, fill: float) -> Tensor:
    """[..., block, head_dim] with a group's numbers as the last dimension, after those of scales and zeros."""
    block, head_dim = x.shape[-2:]
    grouped: Tensor
    if coding.axis == "channel":
        grouped = x.unflatten(-2, (-1, min(coding.group, block))).transpose(-1, -2)
        return grouped
    short = -head_dim % coding.group
    if short:
        x = torch.nn.functional.pad(x, (0, short), value=fill)
    grouped = x.unflatten(-1, (-1, coding.group))
    return grouped


def _spread(parts: list[Tensor], coding: QuantScheme, x: Tensor) -> Iterable[Tensor]:
    """What each group has, for each of its numbers, as `spread_groups` does it."""
    of_block, of_token = coding.groups(*x.shape[-2:])
    is_whole = (of_block if coding.axis == "channel" else of_token) == 1
    # else all are spread at once
    return parts if is_whole else spread_groups(torch.stack(parts), coding, x)


def _bounds(low: Tensor, high: Tensor, coding: QuantScheme) -> tuple[Tensor, Tensor]:
    """The least number of each group of one tensor, and the largest of another."""
    return _group(low, coding, torch.inf).amin(-1), _group(high, coding, -torch.inf).amax(-1)


def _round_down(x: Tensor) -> Tensor:
    """float32 as float16, never above it."""
    half = x.half()
    # a step down in the bits of a positive number is -1, in those of a negative one, -0 among them, 1
    bits = half.view(torch.int16)
    return (bits - (bits >> 14 | 1) * (half > x)).view(torch.float16)


def _round_up(x: Tensor) -> Tensor:
    """float32, not negative, as float16, never below it."""
    half = x.half()
    return (half.view(torch.int16) + (half < x)).view(torch.float16)


def blocks_apart(x: Tensor) -> list[slice]:
    """Runs of blocks of [batch, kv_heads, blocks, block, head_dim]: a sixteenth of them, more where that is little."""
    blocks = x.shape[2]
    step = max(1, blocks // 16, _PIECE // max(1, x[:, :, :1].numel()))
    return [slice(start, start + step) for start in range(0, blocks, step)]


# the fewest numbers of a piece: 256 KiB in float32
_PIECE = 2**16


def _launch(x: Tensor, coding: QuantScheme, packed: QuantizedTensor) -> None:
    batch, kv_heads, blocks, block, head_dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if coding.zeros == "block":
        assert packed.zeros is not None
        for piece in blocks_apart(x):
            known = x[:, :, piece].float().nan_to_num(0.0, 0.0, 0.0)
            packed.zeros[:, :, piece] = known.mean(-2, keepdim=True).clamp_(-_LARGEST, _LARGEST)
    constants, programs, warps = _tiles(coding, block, head_dim)
    launch(
        _quantise_kernel, (batch * kv_heads * blocks * programs,),
        x, *packed[:5], *x.stride()[:4], kv_heads, blocks, **constants, num_warps=warps,
        # rounded after each operation, as on a CPU: the same codes everywhere
        enable_fp_fusion=False,
    )  # fmt: skip


def _tiles(coding: QuantScheme, block: int, head_dim: int) -> tuple[dict[str, float], int, int]:
    """The compile-time arguments, programs per block, and warps."""
    per_channel = coding.axis == "channel"
    planes = 8 if coding.bits == 3 else planes_of(coding.bits)
    width = tile_width(head_dim)
    if per_channel:
        columns, run = min(width, max(16, _TILE // block)), block // planes
        parts = triton.cdiv(head_dim, columns)
    else:
        columns, run = width, min(block // planes, max(1, _TILE // width // planes))
        parts = block // planes // run
    constants: dict[str, float] = {
        "BITS": coding.bits,
        "GROUP": min(coding.group, block if per_channel else width),
        "PER_CHANNEL": per_channel,
        "OUTLIERS": coding.outliers,
        "CENTRED": coding.zeros != "group",
        "MIDDLE": coding.middle,
        "FIRST": FIRST_SCALES.get(coding.bits, 0.0),
        "FITS": FITS,
        "SHIFT": _SHIFT,
        "KEEPS": get_args(Keeps).index(coding.keeps),
        "HEAD_DIM": head_dim,
        "BLOCK": block,
        "PLANES": planes,
        "RUN": run,
        "COLUMNS": columns,
        "PARTS": parts,
    }
    return constants, parts, 8 if planes * run * columns > _TILE // 2 else 4


# numbers of a program's tile
_TILE = 4096


@triton.jit
def _round_half_down(x):
    # float32 as float16, never above it
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    # a step down in the bits of a positive number, up in those of a negative one; below 0 comes the least negative
    below = tl.where(half > 0, bits - 1, tl.where(half == 0, -0x7FFF, bits + 1)).to(tl.int16)
    return tl.where(half.to(tl.float32) > x, below.to(tl.float16, bitcast=True), half)


@triton.jit
def _kept_scale(squares, products, of_levels, half_scale, KEEPS: tl.constexpr):
    # by the sums of x^2, of x * level and of level^2 of each group; where all x are alike, as it was
    known = products > 0
    found = tl.div_rn(squares, tl.where(known, products, 1.0))
    if KEEPS == 1:
        found = tl.sqrt_rn(tl.div_rn(squares, tl.where(known, of_levels, 1.0)))
    found = tl.minimum(tl.maximum(found, 0.0), 65504.0)
    return tl.where(known, found.to(tl.float16), half_scale)


@triton.jit
def _quantise_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, values_ptr, index_ptr,
    x_batch_stride, x_head_stride, x_block_stride, x_stride, kv_heads, blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    OUTLIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    MIDDLE: tl.constexpr,
    FIRST: tl.constexpr,
    FITS: tl.constexpr,
    SHIFT: tl.constexpr,
    KEEPS: tl.constexpr,  # 0: numbers, 1: spread, 2: slope
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # one program owns COLUMNS channels of a block, or of each plane of a block RUN tokens: whole vectors and bytes
    part = tl.program_id(0) % PARTS
    owner = (tl.program_id(0) // PARTS).to(tl.int64)
    LEVELS: tl.constexpr = 2**BITS - 1
    TOKENS: tl.constexpr = PLANES * RUN
    PLANE: tl.constexpr = BLOCK // PLANES
    index = tl.arange(0, TOKENS)
    dim = tl.arange(0, COLUMNS)
    first = 0
    if PER_CHANNEL:
        dim += part * COLUMNS
    else:
        first = part * RUN
    token = index // RUN * PLANE + first + index % RUN  # [T]
    dim_ok = dim < HEAD_DIM
    block_at = owner // blocks // kv_heads * x_batch_stride + owner // blocks % kv_heads * x_head_stride
    x_at = block_at + owner % blocks * x_block_stride + token.to(tl.int64)[:, None] * x_stride + dim[None, :]
    x = tl.load(x_ptr + x_at, mask=dim_ok[None, :], other=0.0).to(tl.float32)  # [T, D]

    # NaN where a number is not finite: it makes its group NaN, and counts as 0 otherwise, as it cannot be ordered
    unknown = x - x
    x = tl.where(unknown == 0, x, 0.0)
    if CENTRED:
        if zeros_ptr is not None:
            # the mean of the channel over the block
            x -= tl.load(zeros_ptr + owner * HEAD_DIM + dim, mask=dim_ok, other=0.0).to(tl.float32)[None, :]
        grouped = tl.reshape(x, [TOKENS, COLUMNS // GROUP, GROUP])
        unknown = tl.sum(tl.reshape(unknown, [TOKENS, COLUMNS // GROUP, GROUP]), 2)
        real = tl.reshape(dim_ok.to(tl.float32), [1, COLUMNS // GROUP, GROUP])
        count = tl.broadcast_to(tl.sum(real, 2), [TOKENS, COLUMNS // GROUP])
        # a group of no channel
        count = tl.maximum(count, 1.0)
        half_scale = (tl.sqrt_rn(tl.div_rn(tl.sum(grouped * grouped, 2), count)) * FIRST).to(tl.float16)  # [T, groups]
        for fit in tl.static_range(FITS + 1):
            scale = half_scale.to(tl.float32)
            inverse = tl.where(
                scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0
            )
            y = grouped * inverse[:, :, None]
            codes = tl.minimum(tl.maximum(tl.floor(y + MIDDLE + 0.5), 0.0), LEVELS)
            level = codes - MIDDLE
            if fit < FITS:
                squares = tl.sum(level * level * real, 2)
                half_scale = tl.div_rn(tl.sum(grouped * level, 2), tl.where(squares > 0, squares, 1.0))
                half_scale = tl.minimum(tl.maximum(half_scale, 0.0), 65504.0).to(tl.float16)
        if KEEPS:
            level *= real
            squares = tl.sum(grouped * grouped, 2)
            half_scale = _kept_scale(squares, tl.sum(grouped * level, 2), tl.sum(level * level, 2), half_scale, KEEPS)
        group = tl.arange(0, COLUMNS // GROUP)
        SCALES: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
        at = (owner * BLOCK + token)[:, None] * SCALES + group[None, :]
        tl.store(scales_ptr + at, half_scale + unknown.to(tl.float16), mask=(group < SCALES)[None, :])
    else:
        low = tl.where(dim_ok[None, :], x, float("inf"))
        high = tl.where(dim_ok[None, :], x, float("-inf"))
        AXIS: tl.constexpr = 0 if PER_CHANNEL else 1
        place = tl.broadcast_to(index[:, None] if PER_CHANNEL else dim[None, :], [TOKENS, COLUMNS])
        if OUTLIERS:
            # which of its vector's outliers a number is, -1 for none
            order = tl.full([TOKENS, COLUMNS], -1, tl.int32)
            for n in range(OUTLIERS):
                chosen = place == tl.expand_dims(tl.argmax(high, AXIS), AXIS)
                order = tl.where(chosen, n, order)
                high = tl.where(chosen, float("-inf"), high)
            low = tl.where(order < 0, low, float("inf"))
            for n in range(OUTLIERS):
                chosen = place == tl.expand_dims(tl.argmin(low, AXIS), AXIS)
                order = tl.where(chosen, OUTLIERS + n, order)
                low = tl.where(chosen, float("inf"), low)
            high = tl.where(order < 0, high, float("-inf"))

        if PER_CHANNEL:
            low = tl.min(tl.reshape(low, [TOKENS // GROUP, GROUP, COLUMNS]), 1)  # [groups, D]
            high = tl.max(tl.reshape(high, [TOKENS // GROUP, GROUP, COLUMNS]), 1)
            unknown = tl.sum(tl.reshape(unknown, [TOKENS // GROUP, GROUP, COLUMNS]), 1)
        else:
            low = tl.min(tl.reshape(low, [TOKENS, COLUMNS // GROUP, GROUP]), 2)  # [T, groups]
            high = tl.max(tl.reshape(high, [TOKENS, COLUMNS // GROUP, GROUP]), 2)
            unknown = tl.sum(tl.reshape(unknown, [TOKENS, COLUMNS // GROUP, GROUP]), 2)
        # a group that has only outliers, or of no channel
        empty = low > high
        # what float16 cannot hold saturates
        low = tl.where(empty, 0.0, tl.minimum(tl.maximum(low, -65504.0), 65504.0))
        high = tl.where(empty, 0.0, tl.minimum(tl.maximum(high, -65504.0), 65504.0))
        half_zero = _round_half_down(low)
        zero = half_zero.to(tl.float32)
        half_scale = -_round_half_down(-tl.div_rn(high - zero, tl.full(high.shape, LEVELS, tl.float32)))
        scale = half_scale.to(tl.float32)
        inverse = tl.where(
            scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0
        )
        SHARED: tl.constexpr = 1 if PER_CHANNEL else 2
        if PER_CHANNEL:
            group = tl.arange(0, TOKENS // GROUP)
            at = (owner * (BLOCK // GROUP) + group)[:, None] * HEAD_DIM + dim[None, :]
            ok = tl.broadcast_to(dim_ok[None, :], [TOKENS // GROUP, COLUMNS])
            grouped = tl.reshape(x, [TOKENS // GROUP, GROUP, COLUMNS])
        else:
            group = tl.arange(0, COLUMNS // GROUP)
            STORED: tl.constexpr = (HEAD_DIM + GROUP - 1) // GROUP
            at = (owner * BLOCK + token)[:, None] * STORED + group[None, :]
            ok = tl.broadcast_to((group < STORED)[None, :], [TOKENS, COLUMNS // GROUP])
            grouped = tl.reshape(x, [TOKENS, COLUMNS // GROUP, GROUP])
        zero = tl.expand_dims(zero, SHARED)
        codes = tl.floor((grouped - zero) * tl.expand_dims(inverse, SHARED) + 0.5)
        codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS)
        if KEEPS:
            real = tl.broadcast_to(dim_ok[None, :].to(tl.float32), [TOKENS, COLUMNS])
            real = tl.reshape(real, grouped.shape)
            count = tl.maximum(tl.sum(real, SHARED), 1.0)
            mean = tl.div_rn(tl.sum(grouped * real, SHARED), count)
            of_codes = tl.div_rn(tl.sum(codes * real, SHARED), count)
            apart = (grouped - tl.expand_dims(mean, SHARED)) * real
            level = (codes - tl.expand_dims(of_codes, SHARED)) * real
            kept = _kept_scale(
                tl.sum(apart * apart, SHARED), tl.sum(apart * level, SHARED), tl.sum(level * level, SHARED), half_scale,
                KEEPS,
            )  # fmt: skip
            exact = mean - kept.to(tl.float32) * of_codes
            moved = tl.minimum(tl.maximum(exact, -65504.0), 65504.0).to(tl.float16)
            # else what float16 rounds from a zero far off would shift all numbers of a group
            fine = tl.abs(moved.to(tl.float32) - exact) <= kept.to(tl.float32) * SHIFT
            half_scale = tl.where(fine, kept, half_scale)
            half_zero = tl.where(fine, moved, half_zero)
        tl.store(zeros_ptr + at, half_zero + unknown.to(tl.float16), mask=ok)
        tl.store(scales_ptr + at, half_scale, mask=ok)
        if OUTLIERS:
            rest = tl.reshape(grouped - (zero + tl.expand_dims(scale, SHARED) * codes), [TOKENS, COLUMNS])
            rest = tl.minimum(tl.maximum(rest, -65504.0), 65504.0)
            for n in range(2 * OUTLIERS):
                value = tl.sum(tl.where(order == n, rest, 0.0), AXIS)
                found = tl.sum(tl.where(order == n, place, 0), AXIS)
                if PER_CHANNEL:
                    outlier_at = (owner * (2 * OUTLIERS) + n) * HEAD_DIM + dim
                    outlier_ok = dim_ok
                else:
                    outlier_at = (owner * BLOCK + token) * (2 * OUTLIERS) + n
                    outlier_ok = token < BLOCK
                tl.store(values_ptr + outlier_at, value.to(tl.float16), mask=outlier_ok)
                tl.store(index_ptr + outlier_at, found.to(tl.uint8), mask=outlier_ok)

    whole = tl.reshape(codes.to(tl.int32), [TOKENS, COLUMNS])
    PER: tl.constexpr = 4 if BITS == 3 else PLANES
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    SHARE: tl.constexpr = PLANES // PER * RUN
    plane = tl.arange(0, PER)[:, None, None]
    planes = tl.reshape(whole & (2**WIDTH - 1), [PER, SHARE, COLUMNS])
    packed = tl.sum(planes << plane * WIDTH, 0)  # [rows, D]
    row = tl.arange(0, SHARE)
    row = row // RUN * PLANE + first + row % RUN
    ROWS: tl.constexpr = BLOCK * BITS // 8
    codes_ptr += owner * (ROWS * HEAD_DIM)
    tl.store(codes_ptr + row[:, None] * HEAD_DIM + dim[None, :], packed.to(tl.uint8), mask=dim_ok[None, :])
    if BITS == 3:
        high_bits = tl.sum(tl.reshape(whole >> 2, [8, RUN, COLUMNS]) << tl.arange(0, 8)[:, None, None], 0)
        row = BLOCK // 4 + first + tl.arange(0, RUN)
        tl.store(codes_ptr + row[:, None] * HEAD_DIM + dim[None, :], high_bits.to(tl.uint8), mask=dim_ok[None, :])


def aot_calls() -> None:
    for head_dim, block, bits, group, outliers, dtype in (
        (64, 64, 2, 64, 1, torch.bfloat16),
        (80, 64, 4, 32, 0, torch.bfloat16),
        (128, 64, 2, 64, 2, torch.bfloat16),
        (128, 64, 3, 32, 2, torch.float32),
        (128, 128, 4, 64, 0, torch.bfloat16),
        (128, 16, 8, 16, 1, torch.bfloat16),
        (256, 64, 2, 64, 3, torch.bfloat16),
        (256, 256, 3, 128, 3, torch.float32),
        (64, 8, 3, 8, 1, torch.bfloat16),
    ):
        for axis in get_args(Axis):
            x = shaped(2, 8, 5, block, head_dim, dtype=dtype)
            quantise(x, QuantScheme(bits, group, axis, outliers))
        if not outliers:
            quantise(x, QuantScheme(bits, 256, "token", zeros="block", keeps="spread"))
            quantise(x, QuantScheme(2, 256, "token", zeros="none", keeps="slope"))
            quantise(x, QuantScheme(bits, group, "channel", keeps="spread"))
            quantise(x, QuantScheme(bits, group, "token", keeps="slope"))
