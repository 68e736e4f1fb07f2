"""Attention of a few rows to packed blocks, decoded by pairs of codes (common/packed_words.py).

    logit of a token in plane j = scale * (q_even . level(j, even) + q_odd . level(j, odd)) + what its zeros add

Keys meet queries in float16, in which levels are exact and a channel's scale is applied to the few queries, not to its
codes. Scales of tokens are applied to logits and to weights, and values are multiplied in bfloat16, in which no small
weight is lost. Logits are rows x tokens and outputs channels x rows, so that a lane has the weights it multiplies where
the softmax left them. A program is one warp, so that none waits for another, where its registers suffice.
"""

# in device functions a tuple grows
# mypy: disable-error-code="assignment"

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_tile import planes_of, tile_shape, tile_start
from kvcompress.kernels.common.packed_words import (
    QUERY_UNIT,
    begins_group,
    channels,
    first_rows,
    load_of_tokens,
    load_pairs,
    load_queries,
    of_groups,
    plane_at,
    plane_levels,
    plane_words,
    turn_of,
)
from kvcompress.kernels.common.quantized import QuantizedTensor, QuantScheme, block_of
from kvcompress.kernels.common.runtime import launch, runs_ptx, tl, triton
from kvcompress.kernels.common.split_attention import MOST_SPLITS, Extents, even_parts, resident_programs
from kvcompress.kernels.common.tile import LOG2E, MIN_SIDE, bound_logits, dot, tile_width, wide
from kvcompress.kernels.merge import merge_stack

# tokens of a tile
_TOKENS = 64
# channels of the widest heads: an output of wider ones does not fit in a warp's registers
_WIDEST = 128


def takes_rows(
    query: Tensor, keys: QuantizedTensor, values: QuantizedTensor, key_coding: QuantScheme, value_coding: QuantScheme,
    kv_heads: int,
) -> bool:  # fmt: skip
    """True where launch_rows can take the call: few rows of 16 bits, 2 to 4 bits, nothing beside codes."""
    _, heads, queries, _ = query.shape
    sides = ((keys, key_coding, keys.codes.shape[-1]), (values, value_coding, values.codes.shape[-1]))
    for packed, coding, size in sides:
        # of a group as many channels as the matrix units take, of both parities
        narrow = min(tile_width(size), coding.group if coding.axis == "token" else 256) < 2 * MIN_SIDE
        if coding.bits > 4 or packed.outlier_index is not None or packed.left is not None or size % 2 or narrow:
            return False
    rows, widest = queries * (heads // kv_heads), max(size for _, _, size in sides)
    if query.dtype == torch.float32 or rows > MIN_SIDE or widest > _WIDEST or value_coding.axis != "token":
        return False
    block = block_of(keys, key_coding)
    tile = tile_shape(block, [key_coding.bits, value_coding.bits], _TOKENS)
    # of a pair of tokens in an operand both third bits must stand alike; of long blocks registers do not suffice
    if (3 in (key_coding.bits, value_coding.bits) and block < 16) or (key_coding.bits == 3 and block > 64):
        return False
    if key_coding.axis == "channel":
        # a plane of a tile has one scale per channel, and a tile those of two groups at most
        group = min(key_coding.group, block)
        fits = (
            tile.blocks == 1 and tile.run >= MIN_SIDE and not group % (block // tile.planes) and group >= 2 * MIN_SIDE
        )
    else:
        fits = tile.run * tile.blocks >= MIN_SIDE and keys.codes.shape[-1] <= 2 * key_coding.group
    paired = [keys.codes, values.codes, *_paired(keys, key_coding), *_paired(values, value_coding)]
    return fits and not any(place % 2 for x in paired for place in (x.storage_offset(), *x.stride()[:-1]))


def _paired(packed: QuantizedTensor, coding: QuantScheme) -> list[Tensor]:
    """Scales and zeros of which two are loaded as one number: of neighbouring channels, or of two groups."""
    by_channel = coding.axis == "channel"
    found = [packed.scales] if by_channel or packed.scales.shape[-1] == 2 else []
    if packed.zeros is not None and (by_channel or coding.zeros == "block" or packed.zeros.shape[-1] == 2):
        found.append(packed.zeros)
    return found


def launch_rows(
    query: Tensor, keys: QuantizedTensor, values: QuantizedTensor, key_coding: QuantScheme, value_coding: QuantScheme,
    positions: Tensor, window_ends: Tensor | None, spec: LogitSpec, offsets: Tensor | None, bias: Tensor | None,
    with_logits: bool, key_blocks: tuple[int, int], value_blocks: tuple[int, int], extents: Extents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """packed_attention, or ragged_packed_attention, where takes_rows says so.

    Args:
        query: with rows as `rows_aligned` leaves them.
        key_blocks, value_blocks: blocks between sequences, and between heads.
        extents: of heads that differ in how many slots they have, whose blocks lie one after another.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, block = positions.shape[1] if extents else keys.codes.shape[1], block_of(keys, key_coding)
    value_dim, tokens, group = values.codes.shape[-1], positions.shape[-1], heads // kv_heads
    blocks = tokens // block
    tile = tile_shape(block, [key_coding.bits, value_coding.bits], _TOKENS)
    programs, tiles = batch * kv_heads, tile.count(blocks)
    constants = _constants("KEY", keys, key_coding) | _constants("VALUE", values, value_coding) | tile.constants()
    # of values around zeros too: of codes that are all 0 or more, what rounds a weight would be left in every channel;
    # of 3 bits registers do not suffice
    if value_coding.bits != 3:
        constants["VALUE_MIDDLE"] = value_coding.middle
    has_thirds = 3 in (key_coding.bits, value_coding.bits)
    # what one warp has too few registers for
    is_large = (
        queries * group > 8
        or max(constants["KEY_GROUPS"], constants["VALUE_GROUPS"]) > 2
        or (key_coding.zeros != "group" and tile.blocks > 1)
        or (key_coding.axis == "token" and has_thirds)
        or (tile.blocks > 2 and constants["KEY_GROUPS"] > 1)
    )
    # and two where one each would leave a GPU half empty
    warps = 2 if is_large or programs * MOST_SPLITS < resident_programs(1, query.device) else 1
    room = tiles * tile.tokens
    average = -(-keys.codes.shape[2] * block // programs) if extents else room
    splits, split_tokens = even_parts(programs, average, room, tile.tokens, resident_programs(warps, query.device))
    shape = (batch, heads, queries) if splits == 1 else (splits, batch, heads, queries)
    out = query.new_empty(*shape, value_dim, dtype=query.dtype if splits == 1 else torch.float32)
    lse = query.new_empty(shape, dtype=torch.float32)
    logits = empty_logits(query, tokens if with_logits else 0, extents)
    # where third bits stand depends on the row; the compiler moves a conversion of codes to before what is loaded, and
    # not to before what is computed from a row. Made anew: one kept could be memory of a CUDA graph
    rows = torch.arange(tile.block // 4, dtype=torch.int16, device=query.device) if has_thirds else None
    launch(
        _packed_rows_kernel, (programs * splits,),
        query.view(torch.int32), *_as_loaded(keys, key_coding), *_as_loaded(values, value_coding), rows,
        positions, window_ends, offsets, bias, *(extents or (None, None)), out, lse, logits if with_logits else None,
        *query.stride()[:3], *key_blocks, *value_blocks,
        positions.shape[1], batch, kv_heads, queries, blocks, splits, split_tokens // tile.tokens, tiles,
        *spec.arguments, **spec.constants, **constants,
        KEY_GROUP=min(key_coding.group, tile.block) if key_coding.axis == "channel" else 0,
        RAGGED=extents is not None, GROUP=group, VALUE_DIM=value_dim, ROWS=8 if queries * group <= 8 else 16,
        BFLOAT16=query.dtype == torch.bfloat16, ASSEMBLY=runs_ptx(query.device), num_warps=warps, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        out, lse = merge_stack(out, lse, query.dtype)
    return out, lse, logits


def empty_logits(query: Tensor, tokens: int, extents: Extents | None) -> Tensor:
    """Logits to write, [batch, heads, tokens]; none are written from the end of a ragged head on."""
    shape = *query.shape[:2], tokens
    if extents is None:
        return query.new_empty(shape, dtype=torch.float32)
    return query.new_full(shape, -torch.inf, dtype=torch.float32)


def _constants(side: str, packed: QuantizedTensor, coding: QuantScheme) -> dict[str, Any]:
    """Of a side: words of a row and of a tile's group, groups of channels, planes that share a byte."""
    size = packed.codes.shape[-1]
    each = tile_width(size) if coding.axis == "channel" else min(coding.group, tile_width(size))
    facts: dict[str, Any] = {"BITS": coding.bits, "WORDS": size // 2, "WIDTH": each // 2, "GROUPS": -(-size // each)}
    is_centred = coding.zeros != "group"
    facts |= {"CENTRED": is_centred, "PLANES": planes_of(coding.bits), "MIDDLE": coding.middle if is_centred else 0.0}
    return {f"{side}_{name}": fact for name, fact in facts.items()}


def _as_loaded(packed: QuantizedTensor, coding: QuantScheme) -> Iterator[Tensor | None]:
    """Codes, scales and zeros; of neighbouring channels, and of two groups, two in one number."""
    yield packed.codes.view(torch.int16)
    paired = _paired(packed, coding)
    for numbers in packed[1:3]:
        yield numbers.view(torch.int32) if any(numbers is x for x in paired) and numbers is not None else numbers


@triton.jit(do_not_specialize=["batch_size", "queries", "blocks", "splits", "split_tiles", "tiles", "window"])
def _packed_rows_kernel(
    query_ptr, key_codes_ptr, key_scales_ptr, key_zeros_ptr, value_codes_ptr, value_scales_ptr, value_zeros_ptr,
    rows_ptr, positions_ptr, query_positions_ptr, offsets_ptr, bias_ptr, starts_ptr, capacities_ptr,
    out_ptr, lse_ptr, logits_ptr,
    query_batch_stride, query_head_stride, query_stride,
    key_batch_blocks, key_head_blocks, value_batch_blocks, value_head_blocks,
    position_heads, batch_size, kv_heads, queries, blocks, splits, split_tiles, tiles, window, scale, softcap,
    KEY_BITS: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_GROUPS: tl.constexpr,  # along the channels
    KEY_CENTRED: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    KEY_MIDDLE: tl.constexpr,  # what is taken from codes
    KEY_GROUP: tl.constexpr,  # tokens that share scales of channels, or 0
    VALUE_BITS: tl.constexpr,
    VALUE_WORDS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_CENTRED: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    VALUE_MIDDLE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    RUN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # of the output: 8 or 16
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    RAGGED: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    # one program owns the rows of one KV head, each a (query, head of the group), and the tiles of one split
    split = tl.program_id(0) % splits
    owner = tl.program_id(0) // splits
    kv_head = (owner % kv_heads).to(tl.int64)
    batch = (owner // kv_heads).to(tl.int64)
    key_base = batch * key_batch_blocks + kv_head * key_head_blocks
    value_base = batch * value_batch_blocks + kv_head * value_head_blocks
    positions_ptr += (batch * position_heads + kv_head % position_heads) * blocks * BLOCK
    bias_base = (batch * kv_heads + kv_head) * blocks * BLOCK
    held = blocks
    if RAGGED:
        # `blocks` are those of the longest head
        bias_base = tl.load(starts_ptr + owner)
        key_base = bias_base // BLOCK
        value_base = key_base
        held = tl.load(capacities_ptr + owner).to(tl.int32) // BLOCK
        tiles = tl.cdiv(held, TILE_BLOCKS) * (BLOCK // (PLANES * RUN))
    key_codes_ptr += key_base * (BLOCK * KEY_BITS // 8 * KEY_WORDS)
    value_codes_ptr += value_base * (BLOCK * VALUE_BITS // 8 * VALUE_WORDS)
    DTYPE: tl.constexpr = tl.bfloat16 if BFLOAT16 else tl.float16
    STRETCH: tl.constexpr = BLOCK // PLANES
    TOKENS: tl.constexpr = TILE_BLOCKS * RUN  # of a plane
    LOW_KEY_BITS: tl.constexpr = 2 if KEY_BITS == 3 else KEY_BITS
    LOW_VALUE_BITS: tl.constexpr = 2 if VALUE_BITS == 3 else VALUE_BITS
    HAS_MEANS: tl.constexpr = KEY_CENTRED and key_zeros_ptr is not None

    column = tl.arange(0, KEY_WIDTH)
    query_ptr += batch * (query_batch_stride // 2) + kv_head * GROUP * (query_head_stride // 2)
    query = load_queries(
        query_ptr, query_head_stride // 2, query_stride // 2, queries, GROUP, KEY_WORDS, KEY_WIDTH, KEY_GROUPS, DTYPE
    )

    # from here on the first ROWS rows
    row = tl.arange(0, ROWS)
    row_ok = row < queries * GROUP
    index = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    if WINDOWED:
        position = tl.load(query_positions_ptr + batch * queries + index, mask=row_ok, other=0)
    if offsets_ptr is not None:
        offset_at = (batch * kv_heads * GROUP + head) * queries + index
        shared = tl.load(offsets_ptr + offset_at, mask=row_ok, other=0.0) * (1.0 / QUERY_UNIT)
    SCALED: tl.constexpr = SOFTCAPPED or logits_ptr is not None or bias_ptr is not None
    row_scale = scale * QUERY_UNIT if SCALED else scale * (QUERY_UNIT * LOG2E)
    if KEY_GROUP == 0 and not KEY_CENTRED:
        sums = ()
        for g in tl.static_range(KEY_GROUPS):
            both = tl.sum(query[2 * g].to(tl.float32), 1) + tl.sum(query[2 * g + 1].to(tl.float32), 1)
            sums = sums + (tl.max(first_rows(tl.broadcast_to(both[:, None], [16, 16]), ROWS), 1),)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # channels x rows, by group, even and odd ones apart
    out = ()
    of_zeros = ()
    for _ in tl.static_range(VALUE_GROUPS):
        empty = tl.zeros([VALUE_WIDTH, ROWS], tl.float32)
        out = out + (empty, empty)
        of_zeros = of_zeros + (tl.zeros([ROWS], tl.float32),)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tiles)):
        block, offset = tile_start(tile, BLOCK, PLANES, RUN, TILE_BLOCKS)
        index_in = tl.arange(0, TOKENS)
        ahead = index_in // RUN
        token_ok = block + ahead < held
        place = (block + ahead) * BLOCK + offset + index_in % RUN
        # what the means of a block add to the products of all its tokens
        if HAS_MEANS:
            if TILE_BLOCKS == 1:
                of_block = load_pairs(key_zeros_ptr, key_base + block, column, KEY_WORDS, KEY_WIDTH)[:, None]
                of_block = tl.broadcast_to(of_block, [KEY_WIDTH, TOKENS])
            else:
                at = (key_base + block + ahead)[None, :] * KEY_WORDS + column[:, None]
                of_block = tl.load(key_zeros_ptr + at, mask=(column < KEY_WORDS)[:, None] & token_ok[None, :], other=0)
            even, odd = channels(of_block)
            mean = dot(query[0], even, tl.zeros([16, TOKENS], tl.float32))
            mean = first_rows(dot(query[1], odd, mean), ROWS)
        all_logits = ()
        most = tl.full([ROWS, TOKENS], float("-inf"), tl.float32)
        for n in tl.static_range(PLANES):
            token = place + plane_at(n, KEY_PLANES, PLANES) * STRETCH
            if KEY_GROUP == 0:
                at = key_base * BLOCK + token
                key_scales = of_groups(key_scales_ptr, at, token_ok, KEY_GROUPS, TILE_BLOCKS)
                if not KEY_CENTRED:
                    key_zeros = of_groups(key_zeros_ptr, at, token_ok, KEY_GROUPS, TILE_BLOCKS)
            if begins_group(n, KEY_PLANES, PLANES, STRETCH, KEY_GROUP):
                at = (key_base + block) * (BLOCK // KEY_GROUP) + plane_at(n, KEY_PLANES, PLANES) * STRETCH // KEY_GROUP
                pairs = load_pairs(key_scales_ptr, at, column, KEY_WORDS, KEY_WIDTH)[None, :]
                even, odd = channels(tl.broadcast_to(pairs, [16, KEY_WIDTH]))
                even_query = query[0] * even
                odd_query = query[1] * odd
                pairs = load_pairs(key_zeros_ptr, at, column, KEY_WORDS, KEY_WIDTH)[:, None]
                even, odd = channels(tl.broadcast_to(pairs, [KEY_WIDTH, TOKENS]))
                of_zeros_of_keys = dot(query[0], even, tl.zeros([16, TOKENS], tl.float32))
                of_zeros_of_keys = dot(query[1], odd, of_zeros_of_keys)
            logits = tl.zeros([ROWS, TOKENS], tl.float32)
            for g in tl.static_range(KEY_GROUPS):
                words, high = plane_words(
                    key_codes_ptr, rows_ptr, block, held, offset, plane_at(n, KEY_PLANES, PLANES), g * KEY_WIDTH,
                    KEY_BITS, KEY_PLANES, KEY_WORDS, KEY_WIDTH, BLOCK, PLANES, RUN, TILE_BLOCKS, ASSEMBLY,
                )  # fmt: skip
                even_levels = plane_levels(
                    words, high, n % KEY_PLANES * LOW_KEY_BITS, KEY_BITS, KEY_MIDDLE, tl.float16, ASSEMBLY
                )
                odd_levels = plane_levels(
                    words, high, n % KEY_PLANES * LOW_KEY_BITS + 8, KEY_BITS, KEY_MIDDLE, tl.float16,
                    ASSEMBLY,
                )  # fmt: skip
                if KEY_GROUP > 0:
                    products = dot(even_query, even_levels, of_zeros_of_keys)
                    products = first_rows(dot(odd_query, odd_levels, products), ROWS)
                else:
                    products = dot(query[2 * g], even_levels, tl.zeros([16, TOKENS], tl.float32))
                    products = first_rows(dot(query[2 * g + 1], odd_levels, products), ROWS)
                if KEY_GROUP == 0:
                    products *= key_scales[g][None, :]
                    if not KEY_CENTRED:
                        products += sums[g][:, None] * key_zeros[g][None, :]
                logits += products
            if HAS_MEANS:
                logits += mean
            if offsets_ptr is not None:
                logits += shared[:, None]
            if SCALED:
                logits = bound_logits(logits, row_scale, softcap, SOFTCAPPED)
            if bias_ptr is not None:
                logits += load_of_tokens(bias_ptr + bias_base + token, token_ok, 0.0, TILE_BLOCKS)[None, :]
            slot_position = load_of_tokens(positions_ptr + token, token_ok, -1, TILE_BLOCKS)
            seen = (slot_position >= 0)[None, :]
            if WINDOWED:
                seen = seen & (slot_position[None, :] > position[:, None] - window)
            logits = tl.where(seen, logits, float("-inf"))
            if logits_ptr is not None:
                # one query: a row is a head
                logits_offset = (batch * kv_heads * GROUP + head) * blocks * BLOCK
                logits_ok = row_ok[:, None] & token_ok[None, :]
                tl.store(logits_ptr + logits_offset[:, None] + token[None, :], logits, mask=logits_ok)
            all_logits = all_logits + (logits,)
            most = tl.maximum(most, logits)

        to_base_2 = LOG2E if SCALED else row_scale
        risen = tl.maximum(peak, tl.max(most, 1) * to_base_2)
        # a query that has seen nothing yet: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        fade = tl.exp2(peak - shift)
        peak = risen
        weights = ()
        of_all = tl.zeros([ROWS, TOKENS], tl.float32)
        for n in tl.static_range(PLANES):
            weight = tl.exp2(all_logits[n] * to_base_2 - shift[:, None])  # [ROWS, T]
            weights = weights + (weight,)
            of_all += weight
        total = total * fade + tl.sum(of_all, 1)
        faded_zeros = ()
        faded = ()
        for g in tl.static_range(VALUE_GROUPS):
            even_out = out[2 * g] * fade[None, :]
            odd_out = out[2 * g + 1] * fade[None, :]
            all_zeros = tl.zeros([ROWS, TOKENS], tl.float32)
            for n in tl.static_range(PLANES):
                token = place + plane_at(n, VALUE_PLANES, PLANES) * STRETCH
                weight = weights[turn_of(plane_at(n, VALUE_PLANES, PLANES), KEY_PLANES, PLANES)]
                at = value_base * BLOCK + token
                scales = of_groups(value_scales_ptr, at, token_ok, VALUE_GROUPS, TILE_BLOCKS)[g]
                if not VALUE_CENTRED:
                    lowest = of_groups(value_zeros_ptr, at, token_ok, VALUE_GROUPS, TILE_BLOCKS)[g]
                    if VALUE_MIDDLE != 0:
                        lowest = lowest + VALUE_MIDDLE * scales
                    all_zeros += weight * lowest[None, :]
                words, high = plane_words(
                    value_codes_ptr, rows_ptr, block, held, offset, plane_at(n, VALUE_PLANES, PLANES),
                    g * VALUE_WIDTH, VALUE_BITS, VALUE_PLANES, VALUE_WORDS, VALUE_WIDTH,
                    BLOCK, PLANES, RUN, TILE_BLOCKS, ASSEMBLY,
                )  # fmt: skip
                even_levels = plane_levels(
                    words, high, n % VALUE_PLANES * LOW_VALUE_BITS, VALUE_BITS, VALUE_MIDDLE, tl.bfloat16, ASSEMBLY
                )
                odd_levels = plane_levels(
                    words, high, n % VALUE_PLANES * LOW_VALUE_BITS + 8, VALUE_BITS, VALUE_MIDDLE, tl.bfloat16, ASSEMBLY
                )
                scaled = tl.trans((weight * scales[None, :]).to(tl.bfloat16))
                even_out = dot(even_levels, scaled, even_out)
                odd_out = dot(odd_levels, scaled, odd_out)
            faded = faded + (even_out, odd_out)
            if VALUE_CENTRED:
                faded_zeros = faded_zeros + (of_zeros[g],)
            else:
                faded_zeros = faded_zeros + (of_zeros[g] * fade + tl.sum(all_zeros, 1),)
        out = faded
        of_zeros = faded_zeros

    lse_offset = ((wide(split) * batch_size + batch) * kv_heads * GROUP + head) * queries + index
    norm = tl.where(total == 0, 0.0, 1.0 / total)
    for g in tl.static_range(VALUE_GROUPS):
        channel = g * 2 * VALUE_WIDTH + tl.arange(0, 2 * VALUE_WIDTH)
        both = tl.reshape(tl.join(tl.trans(out[2 * g]), tl.trans(out[2 * g + 1])), [ROWS, 2 * VALUE_WIDTH])
        both = (both + of_zeros[g][:, None]) * norm[:, None]
        out_ok = row_ok[:, None] & (channel < VALUE_DIM)[None, :]
        out_at = out_ptr + lse_offset[:, None] * VALUE_DIM + channel[None, :]
        tl.store(out_at, both.to(out_ptr.dtype.element_ty), mask=out_ok)
    tl.store(lse_ptr + lse_offset, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)
