"""Attention of one new token per row to blocks of keys that rows share, and to the row's own keys: a step of decoding.

What kernels/prefix.py does for the blocks and kernels/attention.py for each row's own keys, side by side in one stack
of parts, which is merged once, together with learned sink logits:

    out = merge(blocks, own, sinks)

Three launches, whatever the tree: one for all blocks, one for all rows, one that merges. A compiled step takes what it
must know of the tree from tensors that stay where they are until the tree changes (`BlockTables`). Bytes and flops:
those of the two, and their parts once more, in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    slot_attention,
    slot_attention_reference,
)
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, op, runs_triton, shaped
from kvcompress.kernels.common.shared_blocks import KeyBlocks, Sharing, Tiles
from kvcompress.kernels.common.split_attention import launch_split
from kvcompress.kernels.merge import merge_stack, merge_states, merge_states_reference, with_sinks
from kvcompress.kernels.prefix import (
    attend_blocks,
    launch_blocks,
    prefix_attention_reference,
    split_blocks,
    tile_sizes,
)


class BlockTables(NamedTuple):
    """Blocks of keys and who sees them, as an op takes them; made by `block_tables`.

    keys, values: of each block, [kv_heads, tokens, head_dim and value_dim]. Kernels read them by their addresses; here
    they are what keeps the memory alive.
    facts: [blocks + 1, 6] int64, as of `KeyBlocks.laid_out`; addresses are 0 where no kernel runs.
    tiles: [tiles, 5] int32, as of `Tiles`; none where no kernel runs.
    members: [sum of members] int32, the rows of each block, one block after the other, and what `Tiles` adds to them.
    counts: [blocks] int32, how many rows are each block's.
    sizes: as of `tile_sizes`, or none. parts: the most blocks that one row sees.
    """

    keys: list[Tensor]
    values: list[Tensor]
    facts: Tensor
    tiles: Tensor
    members: Tensor
    counts: Tensor
    sizes: list[int]
    parts: int

    def tensors(self) -> list[Tensor]:
        """What was made of the blocks and rows."""
        return [self.facts, self.tiles, self.members, self.counts]


def block_tables(blocks: KeyBlocks, sharing: Sharing, group: int, spec: LogitSpec) -> BlockTables:
    """What a step takes of blocks, of which there is at least one, and of their rows.

    Args:
        group: query heads per KV head. spec: that of the step.
    """
    device = blocks.keys[0].device
    counts = torch.tensor([len(rows) for rows in sharing.rows], dtype=torch.int32).to(device)
    if runs_triton(blocks.keys[0]) and sharing.parts:
        keys, values, facts = blocks.laid_out
        sizes = tile_sizes(keys[0], values[0], sharing, group, spec.is_plain)
        tiles = sharing.tiles(group, sizes[0], device)
        return BlockTables(keys, values, facts, *tiles, counts, list(sizes), sharing.parts)
    rows = torch.tensor([row for block in sharing.rows for row in block], dtype=torch.int32).to(device)
    starts = torch.tensor([[0, 0, 0, 0, 0, start] for start in (*blocks.starts, 0)], dtype=torch.int64).to(device)
    return BlockTables(blocks.keys, blocks.values, starts, rows.new_empty(0, 5), rows, counts, [], sharing.parts)


@op(fake=lambda query, value, **_: query.new_empty(*query.shape[:-1], value.shape[-1]))
def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    spec: LogitSpec,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one token per row to the blocks that it sees and to the row's own keys.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: the rows' own, [batch, kv_heads, tokens, head_dim and value_dim].
        visible: [batch, tokens] bool, as in `causal_attention`: the keys stand in order, the query's own is the last.
        positions: [batch, kv_heads, tokens] int32, as in `slot_attention`, which then tells where keys stand.
        query_positions: [batch, 1] int32, read only where there is a window.
        sinks: [heads], learned logits that belong to no token.

    Returns:
        The output, [batch, heads, 1, value_dim] in query's dtype.
    """
    if query.shape[2] != 1:
        raise ValueError(f"shared_attention takes one token per row, got query {list(query.shape)}")
    if spec.window is not None and query_positions is None:
        raise ValueError("shared_attention needs query_positions where there is a window")
    if tables.sizes and query.numel():
        return _launch(query, key, value, tables, spec, visible, positions, query_positions, sinks)
    if positions is None:
        own = causal_attention(query, key, value, spec, visible)
    else:
        at = positions[:, 0, :1] if query_positions is None else query_positions
        own = slot_attention(query, key, value, positions, at, spec)
    apart = _apart(tables, query, value)
    shared = attend_blocks(query, *apart, spec, query_positions, False, value.shape[-1])
    outs, lses = [shared[0], own[0]], [shared[1], own[1]]
    if sinks is not None:
        outs, lses = with_sinks(outs, lses, sinks)
    return merge_states(outs, lses)[0]


def shared_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    spec: LogitSpec,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What shared_attention means, in plain PyTorch."""
    if positions is None:
        own = causal_attention_reference(query, key, value, spec, visible)
    else:
        at = positions[:, 0, :1] if query_positions is None else query_positions
        own = slot_attention_reference(query, key, value, positions, at, spec)
    shared = prefix_attention_reference(query, *_apart(tables, query, value), spec, query_positions)
    outs, lses = [shared[0], own[0]], [shared[1], own[1]]
    if sinks is not None:
        outs, lses = with_sinks(outs, lses, sinks)
    return merge_states_reference(outs, lses)[0]


def _apart(tables: BlockTables, query: Tensor, value: Tensor) -> tuple[KeyBlocks, Sharing]:
    """The blocks and their rows, read from the tables."""
    members, rows = iter(tables.members.tolist()), []
    for count in tables.counts.tolist():
        rows.append([next(members) for _ in range(count)])
    # kernels' blocks may be padded
    keys = [key[..., : query.shape[-1]] for key in tables.keys]
    values = [each[..., : value.shape[-1]] for each in tables.values]
    return KeyBlocks(keys, values, tables.facts[:-1, 5].tolist()), Sharing(rows, len(query))


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    spec: LogitSpec,
    visible: Tensor | None,
    positions: Tensor | None,
    query_positions: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    tiles = Tiles(tables.tiles, tables.members)
    splits = split_blocks(tables.keys, tiles, tables.sizes)
    parts, own = tables.parts * splits[0], spec
    if positions is None:
        own = spec.within(key.shape[2])
        if own.window is not None:
            # the query sees no further back
            key, value = key[:, :, -own.window :], value[:, :, -own.window :]
            visible = None if visible is None else visible[:, -own.window :]
    out, lse = launch_split(query, key, value, own, visible, positions, query_positions, merge=False, others=parts)
    launch_blocks(
        query, tables.keys, tables.values, tables.facts, tiles, tables.sizes, splits, spec, query_positions, False,
        out[:parts], lse[:parts],
    )  # fmt: skip
    return merge_stack(out, lse, query.dtype, sinks)[0]


def aot_calls() -> None:
    for dtype in AOT_DTYPES:
        key, own = shaped(8, 500, 128, dtype=dtype), shaped(8, 8, 300, 128, dtype=dtype)
        blocks, sharing = KeyBlocks([key] * 2, [key] * 2), Sharing([range(8), range(4)], 8)
        query, at = shaped(8, 32, 1, 128, dtype=dtype), shaped(8, 1, dtype=torch.int32)
        places = shaped(8, 8, 300, dtype=torch.int32)
        for spec in (LogitSpec(0.1), LogitSpec(0.1, window=300, softcap=30.0)):
            tables = block_tables(blocks, sharing, 4, spec)
            shared_attention(query, own, own, tables, spec, None, places, at, shaped(32, dtype=dtype))
