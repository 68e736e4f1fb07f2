"""Attention to keys and values that stay packed: decoded a tile at a time, never into memory.

GEAR (arXiv:2403.05527): with keys D_k + S_k + A_k B_k^T and values D_v + S_v + A_v B_v^T (decoded codes, outliers and
low-rank factors; kernels/quantise.py says how they are stored)

    logits = scale * (q (D_k + S_k)^T + (q B_k) A_k^T)        out = p (D_v + S_v) + (p A_v) B_v^T

so that the low-rank terms cost rank, not head_dim, operations per token, and nothing of full size is ever built.

Bytes: batch * kv_heads * blocks * (QuantScheme.bytes of keys + that of values), each read once for all query heads of a
group. Flops 4 * batch * heads * queries * tokens * (head_dim + rank), and about 5 operations to decode a number:
bound by bandwidth at 8 bits, by decoding at fewer. The bound on the speed-up over 16-bit keys and values is
32 * block * head_dim / (8 * (both QuantScheme.bytes)), 6.4 at 2 bits and groups of 64.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.packed_pieces import attend_in_pieces
from kvcompress.kernels.common.packed_rows import empty_logits, launch_rows, takes_rows
from kvcompress.kernels.common.packed_tile import (
    TileShape,
    add_key_factors,
    add_value_factors,
    base_of,
    load_codes,
    load_decoded,
    middle,
    tile_shape,
    tile_start,
    tile_tokens,
    token_scales,
)
from kvcompress.kernels.common.quantized import (
    QuantizedTensor,
    QuantScheme,
    block_of,
    check_coding,
    coding_constants,
    empty_packed,
    stored_blocks,
)
from kvcompress.kernels.common.runtime import (
    INTERPRETED,
    WIDEST_HEAD,
    attends_in_triton,
    launch,
    op,
    shaped,
    tl,
    triton,
)
from kvcompress.kernels.common.split_attention import Extents, even_parts, resident_programs, split_keys
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
from kvcompress.kernels.common.torch_attention import slots_seen
from kvcompress.kernels.merge import merge_stack
from kvcompress.kernels.quantise import dequantise


@op(fake=lambda query, values, positions, with_logits, **_: empty_result(query, values, positions, with_logits))
def packed_attention(
    query: Tensor,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    key_coding: QuantScheme,
    value_coding: QuantScheme,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    spans: Tensor | None = None,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention of queries to packed tokens, all of which precede every query.

    Args:
        query: [batch, heads, queries, head_dim], heads a multiple of kv_heads.
        keys, values: packed blocks, [batch, kv_heads, blocks, ...], of one block size.
        key_coding, value_coding: how they are packed.
        positions: [batch, 1 or kv_heads, blocks * block] int32, the position of each token; -1 where there is none.
        query_positions: [batch, queries] int32; read only where there is a window.
        spans: [batch, blocks] int32, which basis (`QuantizedTensor.right`) a block has. None: all have the first.
        offsets: [batch, heads, queries] float32, added to a query's q.k with every token: its product with a
            part that all keys share and that is not packed. None: no such part.
        bias: [batch, kv_heads, blocks * block] float32, added to the logits of each token. None: 0.
        with_logits: also returns the logits; for one query.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp (natural),
        [batch, heads, queries] float32; a query that sees nothing has 0 and -inf. With logits also
        [batch, heads, blocks * block] float32, -inf where unseen.

    Raises:
        ValueError: for shapes or codings that do not fit together.
    """
    _check(query, keys, values, key_coding, value_coding, positions, spans, offsets, bias, with_logits)
    run = launch_packed if is_launched(query, values, positions) else attend_in_pieces
    found = run(
        query, keys, values, key_coding, value_coding, positions, query_positions, spec, spans, offsets, bias,
        with_logits,
    )  # fmt: skip
    return found if with_logits else found[:2]


def is_launched(query: Tensor, values: QuantizedTensor, positions: Tensor) -> bool:
    """Whether a kernel takes the call, and not PyTorch."""
    widest = max(query.shape[-1], values.codes.shape[-1])
    if not attends_in_triton(query) or widest > WIDEST_HEAD:
        return False
    # products of wide float32 rows would need more registers than a thread has
    too_wide = not INTERPRETED and query.dtype == torch.float32 and tile_width(widest) > _WIDEST_FLOAT32
    return not too_wide and query.numel() > 0 and positions.numel() > 0


def packed_attention_reference(
    query: Tensor,
    keys: QuantizedTensor,
    values: QuantizedTensor,
    key_coding: QuantScheme,
    value_coding: QuantScheme,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    spans: Tensor | None = None,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    with_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """What packed_attention means, in plain PyTorch: attention to what the packed tensors decode to."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = dequantise(keys, key_coding, dtype, spans).flatten(2, 3)
    value = dequantise(values, value_coding, dtype, spans).flatten(2, 3)
    rows = query.to(dtype).unflatten(1, (key.shape[1], -1))
    logits = rows @ key[:, :, None].mT
    if offsets is not None:
        logits += offsets.to(dtype).unflatten(1, (key.shape[1], -1))[..., None]
    seen = slots_seen(positions, query_positions, spec.window)[:, :, None]
    logits = spec.cap_(logits * spec.scale)
    if bias is not None:
        logits += bias.to(dtype)[:, :, None, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    # a query that sees nothing: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (weights @ value[:, :, None]).flatten(1, 2).to(query.dtype)
    lse = lse.flatten(1, 2).float()
    return (out, lse, logits.flatten(1, 2)[:, :, 0].float()) if with_logits else (out, lse)


def _check(
    query: Tensor, keys: QuantizedTensor, values: QuantizedTensor, key_coding: QuantScheme, value_coding: QuantScheme,
    positions: Tensor, spans: Tensor | None, offsets: Tensor | None, bias: Tensor | None, with_logits: bool,
) -> None:  # fmt: skip
    batch, heads, queries, head_dim = query.shape
    kv_heads, blocks = keys.codes.shape[1:3]
    block, value_block = (block_of(packed, coding) for packed, coding in ((keys, key_coding), (values, value_coding)))
    if (
        keys.codes.shape[:3] != values.codes.shape[:3]
        or block != value_block
        or keys.codes.shape[0] != batch
        or keys.codes.shape[-1] != head_dim
        or heads % kv_heads
        or positions.shape not in ((batch, 1, blocks * block), (batch, kv_heads, blocks * block))
        or (spans is not None and spans.shape != (batch, blocks))
        or (offsets is not None and offsets.shape != query.shape[:3])
        or (bias is not None and bias.shape != (batch, kv_heads, blocks * block))
    ):
        raise ValueError(
            "packed_attention needs query [batch, heads, queries, head_dim], codes [batch, kv_heads, blocks, "
            "block * bits / 8, head_dim] with heads a multiple of kv_heads, positions [batch, 1 or kv_heads, "
            "blocks * block], spans [batch, blocks], offsets [batch, heads, queries] and bias [batch, kv_heads, "
            "blocks * block]; got query "
            f"{list(query.shape)}, {key_coding.bits}-bit keys {list(keys.codes.shape)}, "
            f"{value_coding.bits}-bit values {list(values.codes.shape)}, positions {list(positions.shape)}, "
            f"spans {None if spans is None else list(spans.shape)}, "
            f"offsets {None if offsets is None else list(offsets.shape)}, "
            f"bias {None if bias is None else list(bias.shape)}"
        )
    check_coding(key_coding, block, head_dim)
    check_coding(value_coding, block, values.codes.shape[-1])
    if value_coding.zeros == "block":
        raise ValueError("only keys are packed around the mean of a block, got values with zeros='block'")
    if with_logits and queries != 1:
        raise ValueError(f"packed_attention reports the logits of one query, got query {list(query.shape)}")


def empty_result(
    query: Tensor, values: QuantizedTensor, positions: Tensor, with_logits: bool
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], values.codes.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    logits = query.new_empty(*query.shape[:2], positions.shape[-1], dtype=torch.float32)
    return (out, lse, logits) if with_logits else (out, lse)


def launch_packed(
    query: Tensor, keys: QuantizedTensor, values: QuantizedTensor, key_coding: QuantScheme, value_coding: QuantScheme,
    positions: Tensor, query_positions: Tensor, spec: LogitSpec, spans: Tensor | None, offsets: Tensor | None,
    bias: Tensor | None, with_logits: bool, extents: Extents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """packed_attention, or with extents ragged_packed_attention, by a kernel; the logits [batch, heads, 0] where they
    are not asked for."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = keys.codes.shape[1] if extents is None else positions.shape[1]
    block = block_of(keys, key_coding)
    group, tokens, value_dim = heads // kv_heads, positions.shape[-1], values.codes.shape[-1]
    blocks = tokens // block
    few = takes_rows(query, keys, values, key_coding, value_coding, kv_heads)
    step = max(1, _MEANS // (batch * heads * blocks))
    if key_coding.zeros == "block" and queries > step and not few:
        parts = [
            launch_packed(
                query[:, :, first : first + step], keys, values, key_coding, value_coding, positions,
                query_positions[:, first : first + step], spec, spans,
                None if offsets is None else offsets[:, :, first : first + step], bias, with_logits,
            )
            for first in range(0, queries, step)
        ]  # fmt: skip
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2), parts[0][2]
    query, positions = rows_aligned(query), positions.contiguous()
    window_ends = None if spec.window is None else query_positions.contiguous()
    spans, offsets, bias = (None if x is None else x.contiguous() for x in (spans, offsets, bias))
    keys, key_batch_blocks, key_head_blocks = stored_blocks(keys)
    values, value_batch_blocks, value_head_blocks = stored_blocks(values)
    if few:
        return launch_rows(
            query, keys, values, key_coding, value_coding, positions, window_ends, spec, offsets, bias, with_logits,
            (key_batch_blocks, key_head_blocks), (value_batch_blocks, value_head_blocks), extents,
        )  # fmt: skip
    key_right, value_right = (None if right is None else right.contiguous() for right in (keys.right, values.right))
    dim, value_width = _key_width(head_dim, query.element_size()), tile_width(value_dim)
    block_rows, tile, warps, stages = _tiles(
        queries * group, block, [key_coding.bits, value_coding.bits], max(dim, value_width),
        query.element_size(), keys.outlier_index is not None or values.outlier_index is not None,
        key_coding.zeros != "group",
    )  # fmt: skip
    row_blocks = triton.cdiv(queries * group, block_rows)
    tiles = tile.count(blocks)
    programs = batch * kv_heads * row_blocks
    if extents is None:
        splits, split_tokens = split_keys(programs, tiles * tile.tokens, tile.tokens, query.device)
    else:
        average, resident = (
            -(-keys.codes.shape[2] * block // (batch * kv_heads)),
            resident_programs(warps, query.device),
        )
        splits, split_tokens = even_parts(programs, average, tiles * tile.tokens, tile.tokens, resident)
    shape = (batch, heads, queries) if splits == 1 else (splits, batch, heads, queries)
    out = query.new_empty(*shape, value_dim, dtype=query.dtype if splits == 1 else torch.float32)
    lse = query.new_empty(shape, dtype=torch.float32)
    logits = empty_logits(query, tokens if with_logits else 0, extents)
    constants = _constants(keys, key_coding, values, value_coding, tile, head_dim, dim, value_dim)
    means = None
    if constants["KEY_CENTRED"] and keys.zeros is not None:
        # what the mean of each block adds to the logits of its tokens, [batch, kv_heads, group * queries, blocks]
        rows = query[..., :head_dim].float().unflatten(1, (kv_heads, group)).flatten(2, 3)
        means = (rows @ keys.zeros.flatten(2, 3).float().mT).contiguous()
    launch(
        _packed_kernel, (programs * splits,),
        query, *keys[:6], key_right, *values[:6], value_right, positions, window_ends, spans,
        offsets, bias, *(extents or (None, None)), means, out, lse, logits if with_logits else None,
        *query.stride()[:3], key_batch_blocks, key_head_blocks, value_batch_blocks, value_head_blocks,
        1 if key_right is None else key_right.shape[2], 1 if value_right is None else value_right.shape[2],
        positions.shape[1], batch, kv_heads, queries, blocks, splits, split_tokens // tile.tokens, tiles,
        *spec.arguments, **spec.constants,
        **constants,
        HEAD_ROOM=query.shape[-1], GROUP=group, SPANNED=spans is not None, RAGGED=extents is not None,
        BLOCK_ROWS=block_rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        out, lse = merge_stack(out, lse, query.dtype)
    return out, lse, logits


def _constants(
    keys: QuantizedTensor, key_coding: QuantScheme, values: QuantizedTensor, value_coding: QuantScheme,
    tile: TileShape, head_dim: int, dim: int, value_dim: int,
) -> dict[str, int | bool]:  # fmt: skip
    constants: dict[str, int | bool] = {"HEAD_DIM": head_dim, "DIM": dim}
    constants |= {"VALUE_DIM": value_dim, "VALUE_WIDTH": tile_width(value_dim), **tile.constants()}
    for name, packed, coding, size in (("KEY", keys, key_coding, head_dim), ("VALUE", values, value_coding, value_dim)):
        of_coding = coding_constants(coding, packed, tile.block, size)
        constants |= {f"{name}_{setting}": value for setting, value in of_coding.items()}
        constants[f"{name}_RANK"] = 0 if packed.left is None else packed.left.shape[-1]
    return constants


# the fewest numbers that a 16-bit product may sum over. Where codes come out of joins, Triton 3.6 has each of 4 lanes
# hold 8 numbers of a sum, as if they were read at 4 bits; of a sum of 16 it then counts half twice and drops the rest.
# Triton 3.9 does not
_LEAST_SUM = 32
# the widest tile of float32 queries; wider ones take the PyTorch path on a GPU
_WIDEST_FLOAT32 = 64
# products of queries with the means of blocks that are held at once: 64 MB
_MEANS = 2**24
# as many rows (queries times group) as one tile takes
_MOST_ROWS = 64


def _key_width(head_dim: int, element_size: int) -> int:
    """Columns of a tile of keys; a tile of values sums over its tokens, 32 or more in 16 bits (`_tiles`)."""
    return max(tile_width(head_dim), _LEAST_SUM if element_size < 4 else MIN_SIDE)


def _tiles(
    rows: int, block: int, bits: list[int], width: int, element_size: int, has_outliers: bool, is_centred: bool
) -> tuple[int, TileShape, int, int]:
    """Rows of a tile, its tokens, warps and pipeline stages."""
    block_rows = min(_MOST_ROWS, max(MIN_SIDE, triton.next_power_of_2(rows)))
    if element_size == 4:
        block_rows, tokens = MIN_SIDE, 16
    elif width > 128:
        block_rows, tokens = MIN_SIDE, 32
    else:
        block_rows = min(block_rows, 32 if width > 64 else _MOST_ROWS)
        tokens = 64 if block_rows == MIN_SIDE else 32
    # comparing every number with the index of an outlier takes registers, and so do means of several blocks
    takes_more = has_outliers or (is_centred and block < tokens)
    warps = 8 if takes_more or width > 128 or element_size == 4 else 4
    return block_rows, tile_shape(block, bits, tokens), warps, 1 if element_size == 4 else 2


@triton.jit(do_not_specialize=[
    "key_spans", "value_spans", "batch_size", "queries", "blocks", "splits", "split_tiles", "tiles", "window",
])  # fmt: skip
def _packed_kernel(
    query_ptr,
    key_codes_ptr, key_scales_ptr, key_zeros_ptr, key_outliers_ptr, key_index_ptr, key_left_ptr, key_right_ptr,
    value_codes_ptr, value_scales_ptr, value_zeros_ptr, value_outliers_ptr, value_index_ptr, value_left_ptr,
    value_right_ptr, positions_ptr, query_positions_ptr, spans_ptr, offsets_ptr, bias_ptr, starts_ptr, capacities_ptr,
    means_ptr, out_ptr, lse_ptr, logits_ptr,
    query_batch_stride, query_head_stride, query_stride,
    key_batch_blocks, key_head_blocks, value_batch_blocks, value_head_blocks, key_spans, value_spans,
    position_heads, batch_size, kv_heads, queries, blocks, splits, split_tiles, tiles, window, scale, softcap,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_PER_CHANNEL: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    KEY_CENTRED: tl.constexpr,
    KEY_RANK: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_PER_CHANNEL: tl.constexpr,
    VALUE_OUTLIERS: tl.constexpr,
    VALUE_CENTRED: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    RUN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_ROOM: tl.constexpr,  # HEAD_DIM with the padding of the queries
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SPANNED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_ROWS rows of one KV head and the tiles of one split;
    # a row is one (query, head of the group), so that the group reads and decodes its keys once
    row_blocks = tl.cdiv(queries * GROUP, BLOCK_ROWS)
    split = tl.program_id(0) % splits
    row_block = tl.program_id(0) // splits % row_blocks
    owner = tl.program_id(0) // splits // row_blocks
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
    TOKENS: tl.constexpr = TILE_BLOCKS * PLANES * RUN

    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    row_ok = row < queries * GROUP
    index = (row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    query_offset = batch * query_batch_stride + head * query_head_stride + index * query_stride
    query = load_tile(query_ptr, query_offset, row_ok, 0, DIM, HEAD_ROOM)  # [R, DIM]
    if WINDOWED:
        position = tl.load(query_positions_ptr + batch * queries + index, mask=row_ok, other=0)  # [R]
    if offsets_ptr is not None:
        offset_at = (batch * kv_heads * GROUP + head) * queries + index
        shared = tl.load(offsets_ptr + offset_at, mask=row_ok, other=0.0)  # [R]

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    dim = tl.arange(0, DIM)
    if KEY_CENTRED:
        of_middle = tl.sum(query.to(tl.float32), 1) * middle(KEY_BITS)  # [R]
    if VALUE_CENTRED:
        surplus = tl.zeros([BLOCK_ROWS], tl.float32)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tiles)):
        block, offset = tile_start(tile, BLOCK, PLANES, RUN, TILE_BLOCKS)
        ahead, place = tile_tokens(offset, 1, BLOCK, PLANES, RUN, TILE_BLOCKS)  # [T]
        token_ok = block + ahead < held
        token = (block + ahead) * BLOCK + place
        if KEY_BITS == 16:
            key_at = ((key_base + block + ahead) * BLOCK + place) * HEAD_DIM
            key = load_tile(key_codes_ptr, key_at, token_ok, 0, DIM, HEAD_DIM)
        elif KEY_CENTRED:
            key = load_codes(
                key_codes_ptr, key_base, block, held, offset, dim, KEY_BITS, HEAD_DIM, DIM,
                BLOCK, PLANES, RUN, TILE_BLOCKS,
            )  # fmt: skip
            key = key.to(tl.float32).to(query.dtype)
        else:
            key = load_decoded(
                key_codes_ptr, key_scales_ptr, key_zeros_ptr, key_outliers_ptr, key_index_ptr,
                key_base, block, held, offset,
                KEY_BITS, KEY_GROUP, KEY_PER_CHANNEL, KEY_OUTLIERS, False, HEAD_DIM, DIM,
                BLOCK, PLANES, RUN, TILE_BLOCKS,
            ).to(query.dtype)  # fmt: skip
        logits = dot(query, tl.trans(key), tl.zeros([BLOCK_ROWS, TOKENS], tl.float32))  # [R, T]
        if KEY_CENTRED:
            logits -= of_middle[:, None]
            logits *= token_scales(key_scales_ptr, key_base, block, held, offset, BLOCK, PLANES, RUN, TILE_BLOCKS)[
                None, :
            ]
            if means_ptr is not None:
                mean_at = ((batch * kv_heads * GROUP + head) * queries + index) * blocks + block
                if TILE_BLOCKS == 1:
                    logits += tl.load(means_ptr + mean_at, mask=row_ok, other=0.0)[:, None]
                else:
                    mean_ok = row_ok[:, None] & token_ok[None, :]
                    logits += tl.load(means_ptr + mean_at[:, None] + ahead[None, :], mask=mean_ok, other=0.0)
        if KEY_RANK:
            left_at = (key_base + block + ahead) * BLOCK + place
            for n in tl.static_range(TILE_BLOCKS):
                span = (batch * kv_heads + kv_head) * key_spans + base_of(
                    spans_ptr, batch * blocks + block + n, block + n < held, SPANNED
                )
                of_block = token_ok if TILE_BLOCKS == 1 else token_ok & (ahead == n)
                logits = add_key_factors(
                    logits, query, key_left_ptr, key_right_ptr, left_at, of_block, span, KEY_RANK, HEAD_DIM, DIM
                )
        if offsets_ptr is not None:
            logits += shared[:, None]
        logits = bound_logits(logits, scale, softcap, SOFTCAPPED)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + bias_base + token, mask=token_ok, other=0.0)[None, :]
        slot_position = tl.load(positions_ptr + token, mask=token_ok, other=-1)
        visible = (slot_position >= 0)[None, :]
        if WINDOWED:
            visible = visible & (slot_position[None, :] > position[:, None] - window)
        logits = tl.where(visible, logits, float("-inf"))
        if logits_ptr is not None:
            # one query: a row is a head
            logits_offset = (batch * kv_heads * GROUP + head) * blocks * BLOCK
            tl.store(
                logits_ptr + logits_offset[:, None] + token[None, :], logits, mask=row_ok[:, None] & token_ok[None, :]
            )

        logits *= LOG2E
        risen = tl.maximum(peak, tl.max(logits, 1))
        # a query that has seen nothing yet: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        fade = tl.exp2(peak - shift)
        weight = tl.exp2(logits - shift[:, None])  # [R, T]
        peak = risen
        total = total * fade + tl.sum(weight, 1)
        weight = weight.to(query.dtype)
        if VALUE_CENTRED:
            value = load_codes(
                value_codes_ptr, value_base, block, held, offset, tl.arange(0, VALUE_WIDTH), VALUE_BITS,
                VALUE_DIM, VALUE_WIDTH, BLOCK, PLANES, RUN, TILE_BLOCKS,
            )  # fmt: skip
            value = value.to(tl.float32).to(query.dtype)
            scales = token_scales(value_scales_ptr, value_base, block, held, offset, BLOCK, PLANES, RUN, TILE_BLOCKS)
            scaled = (weight.to(tl.float32) * scales[None, :]).to(query.dtype)
            out = dot(scaled, value, out * fade[:, None])
            # what the middle level, which stands for 0, has added
            surplus = surplus * fade + tl.sum(scaled.to(tl.float32), 1)
        else:
            value = load_decoded(
                value_codes_ptr, value_scales_ptr, value_zeros_ptr, value_outliers_ptr, value_index_ptr,
                value_base, block, held, offset,
                VALUE_BITS, VALUE_GROUP, VALUE_PER_CHANNEL, VALUE_OUTLIERS, False, VALUE_DIM, VALUE_WIDTH,
                BLOCK, PLANES, RUN, TILE_BLOCKS,
            ).to(query.dtype)  # fmt: skip
            out = dot(weight, value, out * fade[:, None])
        if VALUE_RANK:
            left_at = (value_base + block + ahead) * BLOCK + place
            for n in tl.static_range(TILE_BLOCKS):
                span = (batch * kv_heads + kv_head) * value_spans + base_of(
                    spans_ptr, batch * blocks + block + n, block + n < held, SPANNED
                )
                of_block = token_ok if TILE_BLOCKS == 1 else token_ok & (ahead == n)
                out = add_value_factors(
                    out, weight, value_left_ptr, value_right_ptr, left_at, of_block, span,
                    VALUE_RANK, VALUE_DIM, VALUE_WIDTH,
                )  # fmt: skip

    lse_offset = ((wide(split) * batch_size + batch) * kv_heads * GROUP + head) * queries + index
    norm = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    if VALUE_CENTRED:
        out -= (surplus * middle(VALUE_BITS))[:, None]
    store_tile(out_ptr, lse_offset * VALUE_DIM, out * norm, row_ok, 0, VALUE_WIDTH, VALUE_DIM)
    tl.store(lse_ptr + lse_offset, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)


# key bits, value bits, group, outliers, rank, block; slots (storage/quantized_slots.py) have blocks of 32 tokens
_AOT_CODINGS = [
    (2, 2, 32, 2, 4, 64),
    (3, 3, 32, 1, 2, 64),
    (4, 2, 64, 1, 4, 128),
    (2, 2, 64, 0, 0, 64),
    (4, 4, 64, 0, 0, 64),
    (4, 3, 64, 0, 0, 64),
    (3, 2, 64, 0, 0, 64),
    (8, 8, 64, 1, 0, 64),
    (2, 2, 16, 0, 2, 16),
    (4, 4, 64, 0, 0, 32),
    (3, 3, 32, 2, 0, 32),
]
# key bits, value bits, group, rank, block; keys around the mean of their block, values around 0
_AOT_CENTRED = [(2, 2, 256, 0, 64), (2, 2, 256, 2, 16), (4, 3, 256, 0, 64)]


def aot_calls() -> None:
    for dtype, head_dims in ((torch.bfloat16, (64, 80, 128, 256)), (torch.float32, (_WIDEST_FLOAT32,))):
        for head_dim in head_dims:
            for coding in _AOT_CODINGS if head_dim != 80 else _AOT_CODINGS[:3]:
                _aot_call(head_dim, dtype, 4, 1, coding)
            for key_bits, value_bits, size, rank, block in _AOT_CENTRED:
                _aot_call(head_dim, dtype, 4, 1, (key_bits, value_bits, size, 0, rank, block), is_centred=True)
            # many rows, from queries or from heads; other codings only mask more
            for coding in _AOT_CODINGS[:3]:
                _aot_call(head_dim, dtype, 4, 16, coding)
                _aot_call(head_dim, dtype, 64, 1, coding)
            # 16 rows, the most that are decoded by pairs, with all that a layer may ask for
            for coding in [coding for coding in _AOT_CODINGS if not coding[3] and not coding[4]]:
                _aot_call(head_dim, dtype, 4, 4, coding, is_plain=False)


def _aot_call(
    head_dim: int, dtype: torch.dtype, group: int, queries: int, coding: tuple[int, ...], is_centred: bool = False,
    is_plain: bool | None = None,
) -> None:  # fmt: skip
    key_bits, value_bits, size, outliers, rank, block = coding
    is_plain = not outliers if is_plain is None else is_plain
    of_slots, blocks = block == 32, 1024 // block

    def packed(coding: QuantScheme) -> QuantizedTensor:
        parts = empty_packed(shaped(1, 2, blocks, block, head_dim), coding)
        shapes = (blocks, block, rank), (3, head_dim, rank)
        left, right = (shaped(1, 2, *shape, dtype=torch.float16) if rank else None for shape in shapes)
        return parts._replace(left=left, right=right)

    key_coding = QuantScheme(key_bits, size, "token" if of_slots else "channel", outliers, rank)
    value_coding = QuantScheme(value_bits, size, "token", outliers, rank)
    if is_centred:
        key_coding = key_coding._replace(axis="token", zeros="block")
        value_coding = value_coding._replace(zeros="none")
    query = shaped(1, 2 * group, queries, head_dim, dtype=dtype)
    packed_attention(
        query, packed(key_coding), packed(value_coding), key_coding, value_coding,
        shaped(1, 2, 1024, dtype=torch.int32), shaped(1, queries, dtype=torch.int32),
        LogitSpec(0.1) if is_plain else LogitSpec(0.1, window=700, softcap=30.0),
        spans=shaped(1, blocks, dtype=torch.int32) if rank else None,
        offsets=shaped(1, 2 * group, queries) if of_slots else None,
        with_logits=queries == 1 and (of_slots or not is_plain),
    )  # fmt: skip
