"""Attention of few queries, split over the keys so that few heads fill a GPU: decoding, short chunks, slots.

Each program reads one part of the keys and reports the output and log-sum-exp of it alone; kernels/merge.py puts the
parts together. Bytes: keys and values once for all query heads of a group; bound by bandwidth.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import (
    WIDEST_HEAD,
    attends_in_triton,
    core_count,
    has_wgmma,
    launch,
    runs_ptx,
    runs_triton,
    tl,
    triton,
)
from kvcompress.kernels.common.tile import (
    LOG2E,
    MIN_SIDE,
    bound_logits,
    dot,
    load_tile,
    rows_aligned,
    store_tile,
    tile_width,
    wide,
)
from kvcompress.kernels.merge import merge_stack

# as many rows (queries times group) as one tile of the split kernel takes
FEW_ROWS = 64
_PROGRAMS_PER_CORE = 4
# keys below which a part does not repay its share of the merge
_LEAST_SPLIT = 256
MOST_SPLITS = 64
# numbers of latents, and of what keys have behind them, that a tile holds
_WIDEST_LATENT = 512
_WIDEST_TAIL = 128
# what a program does before and after its tiles takes as long as so many tiles
_STARTING = 2


def splits_in_triton(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True where `launch_split` can take these: what any attention kernel takes, and latents in 16 bits."""
    if attends_in_triton(query):
        return True
    return runs_triton(query) and query.element_size() == 2 and _latent_widths(key, value) is not None


def _latent_widths(key: Tensor, value: Tensor) -> tuple[int, int] | None:
    """The tile and the tail that cover keys whose first numbers are the values; None if they are not, or too wide."""
    rank, head_dim = value.shape[-1], key.shape[-1]
    in_keys = value.data_ptr() == key.data_ptr() and value.stride() == key.stride() and rank < head_dim
    dim = triton.next_power_of_2(rank)
    if not in_keys or dim > _WIDEST_LATENT or head_dim - dim > _WIDEST_TAIL:
        return None
    return dim, 0 if head_dim <= dim else max(MIN_SIDE, triton.next_power_of_2(head_dim - dim))


class Extents(NamedTuple):
    """Where each head's slots are among those of all heads, [batch, kv_heads] int64: its first, and how many."""

    starts: Tensor
    capacities: Tensor


def launch_split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: LogitSpec,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    tickets: Tensor | None = None,
    merge: bool = True,
    others: int = 0,
    extents: Extents | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries, split over the keys so that few heads fill a GPU.

    Args:
        visible: as in causal_attention. positions, query_positions, bias: as in slot_attention; without positions a
            causal chunk.
        logits: [batch, kv_heads, tokens, group] float32 to write the logits to, -inf where unseen; for one query.
        tickets: [batch, kv_heads] int32, set to 0 for the launch that follows.
        merge: False leaves the parts apart, float32 with the split as a first dimension.
        others: parts before these, which the caller writes; without `merge` only.
        extents: of heads that differ in how many slots they have; key and value are [slots of all heads, head_dim], and
            bias [slots of all heads].
    """
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1:3] if positions is None else positions.shape[1:]
    value_dim, group = value.shape[-1], heads // kv_heads
    latent = _latent_widths(key, value) if query.shape[-1] > WIDEST_HEAD else None
    query, key = rows_aligned(query), rows_aligned(key)
    # where keys have the values in them, one tile is both
    value = key if latent else rows_aligned(value)
    average = tokens if extents is None else -(-len(key) // (batch * kv_heads))
    if extents is not None:
        # all heads begin at the first slot, from where their starts count
        key, value = (x.expand(batch, kv_heads, -1, -1) for x in (key, value))
    visible = None if visible is None else visible.contiguous().view(torch.uint8)
    positions, bias = (None if x is None else x.contiguous() for x in (positions, bias))
    query_positions = None if spec.window is None or query_positions is None else query_positions.contiguous()
    # bound by bandwidth: columns that are only masked cost nothing, tails would cost registers
    if latent:
        dim, tail = latent
        value_width = dim
    else:
        dim, tail, value_width = tile_width(query.shape[-1]), 0, tile_width(value.shape[-1])
    width, deep = max(dim, value_width), has_wgmma(query.device)
    rows, has_ptx = queries * group, runs_ptx(query.device)
    block_rows, block_tokens, warps, stages = _split_blocks(rows, width + tail, query.element_size(), deep, has_ptx)
    programs = batch * kv_heads * triton.cdiv(queries * group, block_rows)
    resident = resident_programs(warps, query.device)
    splits, split_tokens = even_parts(programs, average, tokens, block_tokens, resident)
    whole = splits == 1 and merge
    shape = (batch, heads, queries) if whole else (others + splits, batch, heads, queries)
    out = query.new_empty(*shape, value_dim, dtype=query.dtype if whole else torch.float32)
    lse = query.new_empty(shape, dtype=torch.float32)
    launch(
        _split_kernel, (programs * splits,),
        query, key, value, *(extents or (None, None)), visible, positions, query_positions, bias,
        out[others:], lse[others:], logits, tickets,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        batch, kv_heads, queries, tokens, splits, split_tokens, *spec.arguments,
        GROUP=group, HEAD_DIM=query.shape[-1], DIM=dim, TAIL=tail, LATENT=latent is not None,
        VALUE_DIM=value_dim, VALUE_ROOM=value.shape[-1], VALUE_WIDTH=value_width,
        PADDED=visible is not None, SLOTTED=positions is not None, RAGGED=extents is not None, BIASED=bias is not None,
        WRITES_LOGITS=logits is not None, **spec.constants,
        BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return (out, lse) if whole or not merge else merge_stack(out, lse, query.dtype)


def split_keys(programs: int, tokens: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many parts to split the keys into, and how many keys are in a part, a multiple of the block."""
    wanted = triton.cdiv(_PROGRAMS_PER_CORE * core_count(device), programs)
    splits = max(1, min(wanted, triton.cdiv(tokens, _LEAST_SPLIT), MOST_SPLITS))
    part = triton.cdiv(triton.cdiv(tokens, splits), block) * block
    return max(1, triton.cdiv(tokens, part)), part


def resident_programs(warps: int, device: torch.device) -> int:
    """How many programs of so many warps a GPU holds at once."""
    return max(1, 8 // warps) * core_count(device)


@functools.lru_cache(1024)
def even_parts(programs: int, tokens: int, longest: int, block: int, resident: int) -> tuple[int, int]:
    """As split_keys, where a GPU holds `resident` programs at once: the fewest rounds times tiles per part.

    tokens: of the average head. longest: of the longest one, which is split into parts as long as those of the others.
    """
    # triton.cdiv takes microseconds
    tiles = max(1, -(-tokens // block))
    best, least = tiles, math.inf
    for wanted in range(1, min(tiles, MOST_SPLITS) + 1):
        part = -(-tiles // wanted)
        splits = -(-tiles // part)
        cost = -(-programs * splits // resident) * (part + _STARTING)
        # more parts are more to merge
        if cost < 0.95 * least:
            best, least = part, cost
    # the splits are those of the longest head
    tiles = max(1, -(-longest // block))
    part = max(best, -(-tiles // MOST_SPLITS))
    return -(-tiles // part), part * block


def _split_blocks(rows: int, width: int, element_size: int, deep: bool, has_ptx: bool) -> tuple[int, int, int, int]:
    """Rows and tokens per tile, warps and stages of the split kernel; deep: shared memory as large as Hopper's.

    Latents are one tile, so that width is their rank and what is behind it, where they are wider than any head.
    """
    block_rows = min(FEW_ROWS, max(MIN_SIDE, triton.next_power_of_2(rows)))
    if element_size == 4:
        if width <= 64:
            return min(block_rows, 32), 32, 8, 2
        return MIN_SIDE, 16, 4 if width <= 128 else 8, 2
    if width > WIDEST_HEAD:
        return (min(block_rows, 32), 32, 8, 2) if has_ptx else (MIN_SIDE, MIN_SIDE, 8, 1)
    if width > 128:
        return min(block_rows, 32), 32, 8, 2
    if block_rows > MIN_SIDE and width > 64:
        return block_rows, 32, 4, 3
    # of 4 stages 3 are buffers: the next tiles come while one is multiplied, and two programs still share a core
    return block_rows, 64, 4, 3 if width <= 64 else 4 if deep else 2


@triton.jit(do_not_specialize=["batch_size", "queries", "tokens", "splits", "split_tokens", "window"])
def _split_kernel(
    query_ptr, key_ptr, value_ptr, starts_ptr, capacities_ptr, visible_ptr, positions_ptr, query_positions_ptr,
    bias_ptr, out_ptr, lse_ptr, logits_ptr, tickets_ptr,
    query_batch_stride, query_head_stride, query_stride,
    key_batch_stride, key_head_stride, key_stride,
    value_batch_stride, value_head_stride, value_stride,
    batch_size, kv_heads, queries, tokens, splits, split_tokens, window, scale, softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TAIL: tl.constexpr,
    LATENT: tl.constexpr,  # values are the first VALUE_DIM numbers of keys
    VALUE_DIM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,  # VALUE_DIM with the padding of the values
    VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTTED: tl.constexpr,
    RAGGED: tl.constexpr,
    BIASED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WRITES_LOGITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_ROWS rows of one KV head and the tokens of one split;
    # a row is one (query, head of the group), so that the group reads its keys once
    row_blocks = tl.cdiv(queries * GROUP, BLOCK_ROWS)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % row_blocks
    owner = tl.program_id(0) // splits // row_blocks
    kv_head = (owner % kv_heads).to(tl.int64)
    batch = (owner // kv_heads).to(tl.int64)
    key_ptr += batch * key_batch_stride + kv_head * key_head_stride
    value_ptr += batch * value_batch_stride + kv_head * value_head_stride
    positions_base = (batch * kv_heads + kv_head) * tokens

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    row_ok = row < queries * GROUP
    index = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    if RAGGED:
        length = tl.load(capacities_ptr + owner).to(tl.int32)
        if split * split_tokens >= tl.maximum(length, 1):
            # behind the head's end; what it would put out is not read where the log-sum-exp is -inf
            none_offset = ((split * batch_size + batch) * kv_heads * GROUP + head) * queries + index
            tl.store(lse_ptr + none_offset, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), mask=row_ok)
            return
        first_slot = tl.load(starts_ptr + owner)
        key_ptr += first_slot * key_stride
        value_ptr += first_slot * value_stride
        bias_base = first_slot
    else:
        length = tokens
        bias_base = positions_base
    query_offset = batch * query_batch_stride + head * query_head_stride + index * query_stride
    query = load_tile(query_ptr, query_offset, row_ok, 0, DIM, HEAD_DIM)  # [R, DIM]
    if TAIL:
        query_tail = load_tile(query_ptr, query_offset, row_ok, DIM, TAIL, HEAD_DIM)  # [R, TAIL]
    if SLOTTED:
        if WINDOWED:
            position = tl.load(query_positions_ptr + batch * queries + index, mask=row_ok, other=0)  # [R]
    else:
        position = tokens - queries + index

    if tickets_ptr is not None:
        tl.store(tickets_ptr + owner, 0)

    # tiles of tokens first .. whole_stop end before the keys do, and without slots before what any query does not see
    first = split * split_tokens
    stop = tl.minimum(first + split_tokens, length)
    whole_stop = stop if SLOTTED else tl.minimum(stop, tokens - queries + block * BLOCK_ROWS // GROUP + 1)
    whole_stop = first + tl.maximum(whole_stop - first, 0) // BLOCK_TOKENS * BLOCK_TOKENS

    # base 2 inside: exp2 is one instruction, and a factor that is applied only there costs none
    SCALED: tl.constexpr = SOFTCAPPED or BIASED or WRITES_LOGITS
    to_base_2 = LOG2E if SCALED else scale * LOG2E
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    column = tl.arange(0, BLOCK_TOKENS)  # [T]

    # whole tiles, which are loaded without a mask, and the rest
    for part in tl.static_range(2):
        for start in range(first if part == 0 else whole_stop, whole_stop if part == 0 else stop, BLOCK_TOKENS):
            token = start + column
            token_ok = token < length if part == 1 else tl.full([BLOCK_TOKENS], True, tl.int1)
            key_offset = column * key_stride
            tile_ptr = key_ptr + wide(start) * key_stride
            key = load_tile(tile_ptr, key_offset, token_ok, 0, DIM, HEAD_DIM)  # [T, DIM]
            logits = dot(query, tl.trans(key), tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32))  # [R, T]
            if TAIL:
                key_tail = load_tile(tile_ptr, key_offset, token_ok, DIM, TAIL, HEAD_DIM)  # [T, TAIL]
                logits = dot(query_tail, tl.trans(key_tail), logits)
            if SCALED:
                logits = bound_logits(logits, scale, softcap, SOFTCAPPED)
            tile_base = positions_base + start
            if SLOTTED:
                slot_position = tl.load(positions_ptr + tile_base + column, mask=token_ok, other=-1)
                seen = (slot_position >= 0)[None, :]
            else:
                slot_position = token
                seen = token_ok[None, :]
                if part == 1:
                    seen = seen & (token[None, :] <= position[:, None])
            if BIASED:
                logits += tl.load(bias_ptr + bias_base + start + column, mask=token_ok, other=0.0)[None, :]
            if WINDOWED:
                seen = seen & (slot_position[None, :] > position[:, None] - window)
            if PADDED:
                visible = tl.load(visible_ptr + batch * tokens + token, mask=token_ok, other=0)
                seen = seen & (visible != 0)[None, :]
            logits = tl.where(seen, logits, float("-inf"))
            if WRITES_LOGITS:
                # one query: a row is a head; the remainder is 0 for a group of 1, which saves offsets
                logits_tile_ptr = logits_ptr + tile_base * GROUP
                logits_offset = column[None, :] * GROUP + (row % GROUP)[:, None]
                tl.store(logits_tile_ptr + logits_offset, logits, mask=row_ok[:, None] & token_ok[None, :])

            risen = tl.maximum(peak, tl.max(logits, 1) * to_base_2)
            # a query that has seen nothing yet: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(logits * to_base_2 - shift[:, None])  # [R, T]
            peak = risen
            total = total * fade + tl.sum(weight, 1)
            if LATENT:
                value = key
            else:
                value_offset = column * value_stride
                tile_ptr = value_ptr + wide(start) * value_stride
                value = load_tile(tile_ptr, value_offset, token_ok, 0, VALUE_WIDTH, VALUE_ROOM)  # [T, VALUE_WIDTH]
            weight = weight.to(value.dtype)
            out = dot(weight, value, out * fade[:, None])

    lse_offset = ((split * batch_size + batch) * kv_heads * GROUP + head) * queries + index
    norm = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    store_tile(out_ptr, lse_offset * VALUE_DIM, out * norm, row_ok, 0, VALUE_WIDTH, VALUE_DIM)
    tl.store(lse_ptr + lse_offset, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)
