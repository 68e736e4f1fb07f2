"""Attention of each row of a batch to blocks of keys that several rows share.

Hydragen (arXiv:2402.05099): the queries of all rows that share a block become one matrix, so that the block is read
once instead of once per row, and its products are matrix products. A row may see any number of blocks (a path through
a tree); the answers merge exactly by their log-sum-exps (kernels/merge.py). As a rule every token of a block precedes
every query of its rows, and within a block nothing is causal. Where tokens of a block are fed again, `causal` bounds
what a query sees by its position.

Bytes: every block once, 2 * kv_heads * tokens * head_dim * element size, and queries and outputs once per block of
their rows, batch * heads * queries * (2 * head_dim * element size + 4). Flops 4 * heads * queries * head_dim *
(rows * tokens, summed over the blocks). That is rows * group flops per byte in 16 bits: bound by arithmetic from about
rows * group = 200 on (H200), by bandwidth below.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention, slot_attention_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, has_wgmma, launch, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing, Tiles
from kvcompress.kernels.common.split_attention import split_keys
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
from kvcompress.kernels.common.torch_attention import cpu_flash, slots_in_blocks
from kvcompress.kernels.merge import merge_stack, merge_states

EMPTY = -1


def prefix_attention(
    query: Tensor,
    blocks: KeyBlocks,
    sharing: Sharing,
    spec: LogitSpec,
    query_positions: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of each row to the tokens of the blocks it sees.

    Args:
        query: [batch, heads, queries, head_dim].
        blocks: keys [kv_heads, tokens, head_dim] and values [kv_heads, tokens, value_dim] of each.
        sharing: the rows of each block.
        query_positions: [batch, queries] int32; read only where there is a window, or `causal`.
        causal: a query sees no position greater than its own. False: all tokens of a block precede every query.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries] float32; 0 and -inf for a row in no block.
    """
    _check(query, blocks, sharing, query_positions, spec.window is not None or causal)
    value_dim = blocks.values[0].shape[-1] if blocks.values else query.shape[-1]
    if runs_triton(query) and query.numel() and any(sharing.rows):
        return _launch(query, blocks, sharing, spec, query_positions, causal)
    return attend_blocks(query, blocks, sharing, spec, query_positions, causal, value_dim)


def attend_blocks(
    query: Tensor,
    blocks: KeyBlocks,
    sharing: Sharing,
    spec: LogitSpec,
    query_positions: Tensor | None,
    causal: bool,
    value_dim: int,
) -> tuple[Tensor, Tensor]:
    """prefix_attention in PyTorch."""
    outs: dict[int, Tensor] = {}
    lses: dict[int, Tensor] = {}
    for block, (key, value) in enumerate(zip(blocks.keys, blocks.values, strict=True)):
        if not sharing.rows[block]:
            continue
        rows = sharing.pick(block, query.device)
        relative = None
        if query_positions is not None and (spec.window is not None or causal):
            relative = query_positions[rows] - blocks.starts[block]
        out, lse = _one_block(query[rows], key, value, relative, spec)
        if causal and relative is not None:
            within = (relative < key.shape[1] - 1).any(-1)
            if bool(within.any()):
                places = torch.arange(key.shape[1], device=key.device).expand(key.shape[:2])
                again = bounded_attention(query[rows][within], key, value, places, relative[within], spec)
                out[within], lse[within] = again
        outs[block], lses[block] = out, lse
    return merge_blocks(outs, lses, sharing, query, value_dim)


def prefix_attention_reference(
    query: Tensor,
    blocks: KeyBlocks,
    sharing: Sharing,
    spec: LogitSpec,
    query_positions: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """What prefix_attention means: every row attends to its own copy of the blocks it sees."""
    out = query.new_zeros(*query.shape[:-1], blocks.values[0].shape[-1] if blocks.values else query.shape[-1])
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    for row in range(len(query)):
        seen = [block for block, rows in enumerate(sharing.rows) if row in rows]
        if not seen:
            continue
        key, value = (torch.cat([each[block] for block in seen], 1)[None] for each in (blocks.keys, blocks.values))
        places = [torch.arange(blocks.keys[block].shape[1]) + blocks.starts[block] for block in seen]
        positions = torch.cat(places).to(query.device, torch.int32).expand(1, key.shape[1], -1)
        at = query.new_zeros(1, query.shape[2]) if query_positions is None else query_positions[row : row + 1]
        for index in range(query.shape[2]):
            own, place = query[row : row + 1, :, index : index + 1], at[:, index : index + 1]
            shown = positions.masked_fill(positions > place, EMPTY) if causal else positions
            part = slot_attention_reference(own, key, value, shown, place, spec)
            out[row, :, index], lse[row, :, index] = part[0][0, :, 0], part[1][0, :, 0]
    return out, lse


def bounded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries that lie among the tokens of a block, each to the positions up to its own.

    Args:
        query: [rows, heads, queries, head_dim].
        key, value: [kv_heads, tokens, head_dim and value_dim].
        positions: [kv_heads, tokens], -1 for no token. query_positions: [rows, queries].
        bias: [kv_heads, tokens] float32, log-weights of the tokens, as in slot_attention.

    Returns:
        As `prefix_attention`.
    """
    apart = (query.shape[0], query.shape[2])
    # all queries as one row's
    together, at = query.transpose(0, 1).flatten(1, 2)[None], query_positions.reshape(1, -1)
    weights = None if bias is None else bias[None]
    parts = slots_in_blocks(together, key[None], value[None], positions[None], at, spec, causal=True, bias=weights)
    out, lse = (part[0].unflatten(1, apart).transpose(0, 1).contiguous() for part in parts)
    return out, lse


def merge_blocks(
    outs: dict[int, Tensor], lses: dict[int, Tensor], sharing: Sharing, query: Tensor, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Merges the answers of blocks, each for the block's rows: out [rows, heads, queries, value_dim] and lse."""
    part_outs: list[Tensor | None] = [None] * sharing.parts
    part_lses: list[Tensor | None] = [None] * sharing.parts
    for block in outs:
        level = sharing.levels[block]
        if len(sharing.rows[block]) == sharing.batch:
            part_outs[level], part_lses[level] = outs[block], lses[block]
            continue
        out, lse = part_outs[level], part_lses[level]
        if out is None or lse is None:
            out = query.new_zeros(*query.shape[:-1], value_dim)
            lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
            part_outs[level], part_lses[level] = out, lse
        rows = sharing.pick(block, query.device)
        out[rows], lse[rows] = outs[block], lses[block]
    filled = [out for out in part_outs if out is not None], [lse for lse in part_lses if lse is not None]
    if not filled[0]:
        return query.new_zeros(*query.shape[:-1], value_dim), query.new_full(
            query.shape[:-1], -torch.inf, dtype=torch.float32
        )
    return merge_states(*filled) if len(filled[0]) > 1 else (filled[0][0], filled[1][0])


def _one_block(
    query: Tensor, key: Tensor, value: Tensor, relative: Tensor | None, spec: LogitSpec
) -> tuple[Tensor, Tensor]:
    """Attention of the rows [rows, heads, queries, head_dim] of one block, as one matrix per KV head."""
    rows, heads, queries, head_dim = query.shape
    kv_heads, tokens, value_dim = value.shape
    if tokens == 0:
        return query.new_zeros(rows, heads, queries, value_dim), query.new_full(
            (rows, heads, queries), -torch.inf, dtype=torch.float32
        )
    if spec.is_plain and not query.is_cuda and key.shape[-1] == value_dim:
        matrix = query.reshape(rows, kv_heads, -1, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
        out, lse = cpu_flash(matrix, key[None], value[None], spec.scale)
        out = out.reshape(kv_heads, rows, -1, queries, value_dim).transpose(0, 1)
        lse = lse.reshape(kv_heads, rows, -1, queries).transpose(0, 1)
        return out.reshape(rows, heads, queries, value_dim), lse.reshape(rows, heads, queries)
    positions = torch.arange(tokens, dtype=torch.int32, device=query.device).expand(1, kv_heads, -1)
    together = query.transpose(0, 1).reshape(1, heads, rows * queries, head_dim)
    at = positions[:, 0, :1] if relative is None else relative.reshape(1, -1)
    out, lse = slot_attention(together, key[None], value[None], positions, at, spec)
    out, lse = (part[0].unflatten(1, (rows, queries)).transpose(0, 1).contiguous() for part in (out, lse))
    return out, lse


def _check(
    query: Tensor, blocks: KeyBlocks, sharing: Sharing, query_positions: Tensor | None, reads_positions: bool
) -> None:
    if len(query) != sharing.batch or len(blocks.keys) != len(sharing.rows):
        raise ValueError(
            f"prefix_attention needs {len(sharing.rows)} blocks and queries of {sharing.batch} rows; got "
            f"{len(blocks.keys)} blocks and query {list(query.shape)}"
        )
    for key in blocks.keys:
        if key.shape[-1] != query.shape[-1] or query.shape[1] % key.shape[0]:
            raise ValueError(
                "prefix_attention needs query [batch, heads, queries, head_dim] and keys [kv_heads, tokens, head_dim] "
                f"with heads a multiple of kv_heads; got query {list(query.shape)} and a key {list(key.shape)}"
            )
    if reads_positions and query_positions is None:
        raise ValueError("prefix_attention needs query_positions where there is a window, or it is causal")


def _launch(
    query: Tensor,
    blocks: KeyBlocks,
    sharing: Sharing,
    spec: LogitSpec,
    query_positions: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    keys, values, _ = laid_out = blocks.laid_out
    group = heads // keys[0].shape[0]
    sizes = tile_sizes(keys[0], values[0], sharing, queries * group, spec.is_plain and not causal)
    tiles = sharing.tiles(queries * group, sizes[0], query.device)
    splits = split_blocks(keys, tiles, sizes)
    parts = sharing.parts * splits[0]
    shape = (batch, heads, queries) if parts == 1 else (parts, batch, heads, queries)
    value_dim = blocks.values[0].shape[-1]
    out = query.new_empty(*shape, value_dim, dtype=query.dtype if parts == 1 else torch.float32)
    lse = query.new_empty(shape, dtype=torch.float32)
    launch_blocks(query, *laid_out, tiles, sizes, splits, spec, query_positions, causal, out, lse)
    return (out, lse) if parts == 1 else merge_stack(out, lse, query.dtype)


def split_blocks(keys: list[Tensor], tiles: Tiles, sizes: Sequence[int]) -> tuple[int, int]:
    """How many parts each block is read in, and how many tokens are in one."""
    longest = max(key.shape[1] for key in keys)
    return split_keys(len(tiles.facts) * keys[0].shape[0], longest, sizes[1], keys[0].device)


def launch_blocks(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    facts: Tensor,
    tiles: Tiles,
    sizes: Sequence[int],
    splits: tuple[int, int],
    spec: LogitSpec,
    query_positions: Tensor | None,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes the attention to each level of blocks, by parts.

    Args:
        keys, values, facts: as of `KeyBlocks.laid_out`.
        sizes: as of `tile_sizes`, by which the tiles are made. splits: as of `split_blocks`.
        out, lse: contiguous, with levels times parts as a first dimension.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, group = keys[0].shape[0], heads // keys[0].shape[0]
    query = rows_aligned(query)
    block_rows, block_tokens, warps, stages = sizes
    reads_positions = query_positions is not None and (spec.window is not None or causal)
    query_positions = query_positions.contiguous() if query_positions is not None and reads_positions else None
    launch(
        _prefix_kernel, (len(tiles.facts) * splits[0] * kv_heads,),
        query, facts, *tiles, query_positions, out, lse,
        *query.stride()[:3],
        batch, kv_heads, queries, len(tiles.facts), *splits, *spec.arguments,
        GROUP=group, HEAD_DIM=keys[0].shape[-1], DIM=tile_width(keys[0].shape[-1]),
        VALUE_DIM=out.shape[-1], VALUE_ROOM=values[0].shape[-1], VALUE_WIDTH=tile_width(values[0].shape[-1]),
        CAUSAL=causal, **spec.constants,
        BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def tile_sizes(key: Tensor, value: Tensor, sharing: Sharing, each: int, plain: bool) -> tuple[int, int, int, int]:
    """Rows and tokens per tile, warps and pipeline stages, for blocks like these; each: rows of a member."""
    most = max(len(rows) for rows in sharing.rows) * each
    width = max(tile_width(key.shape[-1]), tile_width(value.shape[-1]))
    return _blocks(most, width, key.element_size(), has_wgmma(key.device), plain)


# from this many rows on, a tile is as large as registers allow
_MANY_ROWS = 128


def _blocks(rows: int, width: int, element_size: int, wgmma: bool, plain: bool) -> tuple[int, int, int, int]:
    """Rows and tokens per tile, warps and pipeline stages; plain: no window, bound or softcap, which take registers."""
    few = min(64, max(MIN_SIDE, triton.next_power_of_2(rows)))
    if element_size == 4:
        return (min(few, 32), 16, 4 if width <= 64 else 8, 2) if width <= 128 else (MIN_SIDE, 16, 8, 2)
    if width > 128:
        return (64, 32, 8, 2) if wgmma and plain and rows > 32 else (min(few, 32), 32, 8, 2)
    if rows < _MANY_ROWS:
        return few, 64 if width <= 64 else 32, 8 if few == 64 and (width <= 64 or not plain) else 4, 3
    if not wgmma and (width > 64 or not plain):
        return 64, 64, 8, 3 if width <= 64 else 2
    return _MANY_ROWS, 64 if plain or width <= 64 else 32, 8, 3


@triton.jit
def _load_rows(ptr, offset, WIDTH: tl.constexpr, DIM: tl.constexpr):
    # load_tile where all rows exist: no predicates, which take registers
    dim = tl.arange(0, WIDTH)
    if WIDTH <= DIM:
        tile = tl.load(ptr + offset[:, None] + dim[None, :])
    else:
        tile = tl.load(ptr + offset[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    return tile  # [rows, WIDTH]


@triton.jit(do_not_specialize=["batch_size", "queries", "tiles", "splits", "split_tokens", "window"])
def _prefix_kernel(
    query_ptr, blocks_ptr, tiles_ptr, members_ptr, query_positions_ptr, out_ptr, lse_ptr,
    query_batch_stride, query_head_stride, query_stride,
    batch_size, kv_heads, queries, tiles, splits, split_tokens, window, scale, softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # with the padding of the keys
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,  # VALUE_DIM with the padding of the values
    VALUE_WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_ROWS rows of one block and KV head, and the tokens of one split; a row is one (member,
    # query, head of the group). Programs that read the same keys come one after the other
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    kv_head = (tl.program_id(0) // tiles // splits).to(tl.int64)
    block = tl.load(tiles_ptr + tile * 5)
    first = tl.load(tiles_ptr + tile * 5 + 1)
    rows = tl.load(tiles_ptr + tile * 5 + 2)
    members = tl.load(tiles_ptr + tile * 5 + 3)
    level = tl.load(tiles_ptr + tile * 5 + 4)
    # only the address of a block is known: the compiler must be told that its rows are aligned
    key_ptr = tl.multiple_of(tl.load(blocks_ptr + block * 6).to(query_ptr.dtype), 16)
    value_ptr = tl.multiple_of(tl.load(blocks_ptr + block * 6 + 1).to(query_ptr.dtype), 16)
    key_ptr += kv_head * tl.multiple_of(tl.load(blocks_ptr + block * 6 + 2), 16)
    value_ptr += kv_head * tl.multiple_of(tl.load(blocks_ptr + block * 6 + 3), 16)
    tokens = tl.load(blocks_ptr + block * 6 + 4).to(tl.int32)

    row = first + tl.arange(0, BLOCK_ROWS)  # [R]
    row_ok = row < rows
    member = row // (queries * GROUP)
    batch = tl.load(members_ptr + members + member, mask=row_ok, other=0).to(tl.int64)
    index = (row // GROUP % queries).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    query_offset = batch * query_batch_stride + head * query_head_stride + index * query_stride
    query = load_tile(query_ptr, query_offset, row_ok, 0, DIM, HEAD_DIM)  # [R, DIM]

    # where the row's results go, in one number: more of them would occupy registers through the loop
    result = ((batch * kv_heads * GROUP + head) * queries + index).to(tl.int32)

    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, tokens)
    if WINDOWED or CAUSAL:
        # positions relative to the block's first token
        start = tl.load(blocks_ptr + block * 6 + 5).to(tl.int32)
        position = tl.load(query_positions_ptr + batch * queries + index, mask=row_ok, other=2147483647) - start
    if WINDOWED:
        low = tl.maximum(tl.min(position, 0) - window + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS
        begin = tl.maximum(begin, low)

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    column = tl.arange(0, BLOCK_TOKENS)  # [T]
    # all tokens of a tile are seen where it is full: only the last one needs a mask
    full = tl.maximum(begin, end // BLOCK_TOKENS * BLOCK_TOKENS)

    for part in tl.static_range(2):
        if part == 0:
            start_token = begin
            stop_token = tl.minimum(full, end)
        else:
            start_token = full
            stop_token = end
        for start_of_tile in range(start_token, stop_token, BLOCK_TOKENS):
            token = start_of_tile + column
            token_ok = token < tokens
            tile_ptr = key_ptr + wide(start_of_tile) * HEAD_DIM
            if part == 0:
                key = _load_rows(tile_ptr, column * HEAD_DIM, DIM, HEAD_DIM)  # [T, DIM]
            else:
                key = load_tile(tile_ptr, column * HEAD_DIM, token_ok, 0, DIM, HEAD_DIM)
            logits = dot(query, tl.trans(key), tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32))  # [R, T]
            # base 2 inside: exp2 is one instruction
            logits = bound_logits(logits, scale, softcap, SOFTCAPPED) * LOG2E
            if part == 1:
                logits = tl.where(token_ok[None, :], logits, float("-inf"))
            if CAUSAL:
                behind = position[:, None] - token[None, :]  # [R, T]
                if WINDOWED:
                    # one comparison for both bounds saves registers: a negative number is a large one when unsigned
                    seen = behind.to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)
                else:
                    seen = behind >= 0
                logits = tl.where(seen, logits, float("-inf"))
            elif WINDOWED:
                logits = tl.where(token[None, :] > position[:, None] - window, logits, float("-inf"))
            risen = tl.maximum(peak, tl.max(logits, 1))
            # a query that has seen nothing yet: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(logits - shift[:, None])  # [R, T]
            peak = risen
            total = total * fade + tl.sum(weight, 1)
            tile_ptr = value_ptr + wide(start_of_tile) * VALUE_ROOM
            if part == 0:
                value = _load_rows(tile_ptr, column * VALUE_ROOM, VALUE_WIDTH, VALUE_ROOM)  # [T, VALUE_WIDTH]
            else:
                value = load_tile(tile_ptr, column * VALUE_ROOM, token_ok, 0, VALUE_WIDTH, VALUE_ROOM)
            out = dot(weight.to(value.dtype), value, out * fade[:, None])

    results = batch_size.to(tl.int64) * kv_heads * GROUP * queries
    part_row = (level * splits + split) * results + result
    norm = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    store_tile(out_ptr, part_row * VALUE_DIM, out * norm, row_ok, 0, VALUE_WIDTH, VALUE_DIM)
    tl.store(lse_ptr + part_row, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)


def aot_calls() -> None:
    for head_dim in (64, 80, 128, 256):
        for dtype in AOT_DTYPES:
            key = shaped(8, 500, head_dim, dtype=dtype)
            # four rows of each member
            for batch in (1, 8, 16, _MANY_ROWS // 4):
                query, at = shaped(batch, 32, 1, head_dim, dtype=dtype), shaped(batch, 1, dtype=torch.int32)
                # two blocks that all rows see have separate results
                blocks, sharing = KeyBlocks([key] * 2, [key] * 2), Sharing([range(batch)] * 2, batch)
                prefix_attention(query, blocks, sharing, LogitSpec(0.1))
                prefix_attention(query, blocks, sharing, LogitSpec(0.1, window=300, softcap=30.0), at, causal=True)
