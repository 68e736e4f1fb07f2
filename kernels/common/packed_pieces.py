"""Attention to packed keys and values in plain PyTorch, a piece of blocks at a time: packed_attention's path on a CPU.

A piece costs mostly its calls, so what is small (scales, zeros, factors) meets the queries once for all blocks, and a
piece only unpacks its codes into a buffer that stays in a core's cache, and multiplies.
"""

import itertools

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.quantized import (
    PLAIN,
    QuantizedTensor,
    QuantScheme,
    block_of,
    spread_groups,
    unpack_codes,
)
from kvcompress.kernels.common.torch_attention import slots_seen

# numbers that a piece decodes at once: 2 MB in float32, near what a core's cache holds; half as many take longer,
# for their calls
_PIECE = 2**19
# logits held at once: 8 MB in float32
_LOGITS = 2**21
# less than any sum of weights, of which one is 1
_TINY = 1e-30
# from this many numbers of a group per row on, scales are applied to rows instead of codes
_FOLDED = 8


def attend_in_pieces(
    query: Tensor,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    key_coding: QuantScheme,
    value_coding: QuantScheme,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    spans: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    with_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `packed_attention`, the logits [batch, heads, 0] where they are not asked for."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, blocks = keys.codes.shape[1:3]
    tokens, value_dim = positions.shape[-1], values.codes.shape[-1]
    group, block = heads // kv_heads, tokens // max(1, blocks)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch, heads, queries, value_dim)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    kept = query.new_empty(batch, heads, tokens if with_logits else 0, dtype=torch.float32)
    if not tokens:
        return out.zero_(), lse.fill_(-torch.inf), kept
    # ordered by query first, so that the rows of a query are masked together
    rows = query.view(batch, kv_heads, group, queries, head_dim).transpose(2, 3)
    shared = None if offsets is None else offsets.view(batch, kv_heads, group, queries).transpose(2, 3)
    step = max(1, _LOGITS // max(1, batch * heads * tokens))
    pieces = _pieces(blocks, batch * kv_heads * block * max(head_dim, value_dim))
    longest = max((piece.stop - piece.start for piece in pieces), default=0)
    room = query.new_empty(batch * kv_heads * longest * block * max(head_dim, value_dim), dtype=dtype)
    for first in range(0, queries, step):
        part = rows[:, :, first : first + step].to(dtype).mul(spec.scale)
        chosen, some = slice(first, first + part.shape[2]), part.flatten(2, 3)
        logits = _key_products(some, keys, key_coding, pieces, spans, room)
        if shared is not None:
            logits += shared[:, :, chosen].to(dtype).mul(spec.scale).flatten(2, 3)[..., None]
        spec.cap_(logits)
        if bias is not None:
            logits += bias.to(dtype)[:, :, None]
        seen = slots_seen(positions, query_positions[:, chosen], spec.window)[:, :, :, None]
        if query.is_cuda or not bool(seen.all()):
            logits.unflatten(2, (-1, group)).masked_fill_(~seen, -torch.inf)
        if with_logits:
            kept.copy_(logits.view_as(kept))
        peak = logits.amax(-1, keepdim=True)
        # a query that sees nothing: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
        weights = logits.sub_(peak.masked_fill_(peak == -torch.inf, 0.0)).exp_()
        total = weights.sum(-1, keepdim=True)
        found = _value_products(weights, values, value_coding, pieces, spans, room).div_(total.clamp(min=_TINY))
        by_head = found.unflatten(2, (-1, group)).transpose(2, 3)
        out[:, :, chosen] = by_head.flatten(1, 2)
        part_lse = total.log_().add_(peak)
        lse[:, :, chosen] = part_lse.unflatten(2, (-1, group)).transpose(2, 3).reshape(batch, heads, -1)
    return out, lse, kept


def _pieces(blocks: int, numbers: int) -> list[slice]:
    """Runs of blocks of nearly equal length; a block has so many numbers."""
    count = -(-blocks * numbers // _PIECE)
    ends = [blocks * n // count for n in range(count + 1)] if count else [0]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends) if stop > start]


def _key_products(
    rows: Tensor, keys: QuantizedTensor, coding: QuantScheme, pieces: list[slice], spans: Tensor | None, room: Tensor
) -> Tensor:
    """rows @ keys^T, [batch, kv_heads, rows, tokens]."""
    if coding == PLAIN:
        return rows @ keys.codes.to(rows.dtype).flatten(2, 3).mT
    blocks, block = keys.codes.shape[2], block_of(keys, coding)
    per_block = block // min(coding.group, block) if coding.axis == "channel" else 1
    # [batch, kv_heads, groups, rows, tokens of a group]
    products = rows.new_empty(*rows.shape[:2], blocks * per_block, rows.shape[2], block // per_block)
    folded = _is_folded(keys, coding, rows.shape[2], "channel", block)
    if folded:
        # the scales of a channel are applied to the few rows instead of its many codes
        scaled = rows[:, :, None] * keys.scales.to(rows.dtype).flatten(2, 3)[:, :, :, None]
    is_centred = coding.zeros != "group"
    for piece in pieces:
        of_piece = slice(piece.start * per_block, piece.stop * per_block)
        codes = _codes(keys, coding, piece, room)
        if is_centred:
            found = (rows @ codes.flatten(2, 3).mT).unflatten(-1, (-1, block)).transpose(2, 3)
        elif folded:
            found = scaled[:, :, of_piece] @ codes.unflatten(3, (per_block, -1)).flatten(2, 3).mT
        else:
            found = rows @ _decoded(codes, keys, coding, piece).flatten(2, 3).mT
            found = found.unflatten(-1, (-1, products.shape[-1])).transpose(2, 3)
        products[:, :, of_piece] = found
    if is_centred:
        products -= rows.sum(-1)[:, :, None, :, None] * coding.middle
        products *= keys.scales.to(rows.dtype).squeeze(-1)[:, :, :, None]
    if keys.zeros is not None and (folded or is_centred):
        products += (rows @ keys.zeros.to(rows.dtype).flatten(2, 3).mT).transpose(2, 3)[..., None]
    if keys.left is not None and keys.right is not None:
        of_left = (rows[:, :, None] @ _bases(keys.right, spans, rows.dtype)) @ keys.left.to(rows.dtype).mT
        products += of_left.unflatten(-1, (per_block, -1)).transpose(3, 4).flatten(2, 3)
    return products.transpose(2, 3).flatten(3)


def _value_products(
    weights: Tensor,
    values: QuantizedTensor,
    coding: QuantScheme,
    pieces: list[slice],
    spans: Tensor | None,
    room: Tensor,
) -> Tensor:
    """weights @ values, [batch, kv_heads, rows, value_dim]."""
    block, value_dim = block_of(values, coding), values.codes.shape[-1]
    out = weights.new_zeros(*weights.shape[:3], value_dim)
    folded = _is_folded(values, coding, weights.shape[2], "token", value_dim)
    if folded:
        # [batch, kv_heads, groups, rows, tokens]
        scaled = weights[:, :, None] * values.scales.to(weights.dtype).flatten(2, 3).permute(0, 1, 3, 2)[:, :, :, None]
    for piece in pieces:
        tokens = slice(piece.start * block, piece.stop * block)
        codes = _codes(values, coding, piece, room)
        if folded:
            columns = codes.flatten(2, 3).split(coding.group, -1)
            for n, (part, target) in enumerate(zip(columns, out.split(coding.group, -1), strict=True)):
                target += scaled[:, :, n, :, tokens] @ part
        else:
            out += weights[..., tokens] @ _decoded(codes, values, coding, piece).flatten(2, 3)
    if folded:
        # what a code of 0 stands for
        lowest = values.scales.to(weights.dtype).mul(-coding.middle) if values.zeros is None else values.zeros
        of_zeros = weights @ lowest.to(weights.dtype).flatten(2, 3)  # [batch, kv_heads, rows, groups]
        for n, target in enumerate(out.split(coding.group, -1)):
            target += of_zeros[..., n : n + 1]
    if values.left is not None and values.right is not None:
        of_left = weights.unflatten(-1, (-1, block)).transpose(2, 3) @ values.left.to(weights.dtype)
        out += (of_left @ _bases(values.right, spans, weights.dtype).mT).sum(2)
    return out


def _is_folded(packed: QuantizedTensor, coding: QuantScheme, rows: int, axis: str, length: int) -> bool:
    return coding.axis == axis and packed.outlier_index is None and min(coding.group, length) >= _FOLDED * rows


def _codes(packed: QuantizedTensor, coding: QuantScheme, piece: slice, room: Tensor) -> Tensor:
    """Some blocks' codes as floats, in `room`: [batch, kv_heads, blocks, block, head_dim]."""
    codes = unpack_codes(packed.codes[:, :, piece], coding.bits)
    return room[: codes.numel()].view(codes.shape).copy_(codes)


def _decoded(codes: Tensor, packed: QuantizedTensor, coding: QuantScheme, piece: slice) -> Tensor:
    """Decodes codes in place, without low-rank terms."""
    scales = spread_groups(packed.scales[:, :, piece].to(codes.dtype), coding, codes)
    if packed.zeros is None:
        return codes.sub_(coding.middle).mul_(scales)
    codes.mul_(scales).add_(spread_groups(packed.zeros[:, :, piece].to(codes.dtype), coding, codes))
    if packed.outlier_index is not None and packed.outlier_values is not None:
        index, found = packed.outlier_index[:, :, piece], packed.outlier_values[:, :, piece]
        codes.scatter_add_(-2 if coding.axis == "channel" else -1, index.long(), found.to(codes.dtype))
    return codes


def _bases(right: Tensor, spans: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The basis of each block, [batch, kv_heads, blocks or 1, head_dim, rank]."""
    if spans is None or right.shape[2] == 1:
        return right[:, :, :1].to(dtype)
    batch = torch.arange(len(right), device=right.device)[:, None]
    return right.transpose(1, 2)[batch, spans.long()].transpose(1, 2).to(dtype)
