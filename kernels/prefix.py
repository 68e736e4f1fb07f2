"""Attention of each row of a batch to blocks of keys that several rows share.

Hydragen (arXiv:2402.05099): the queries of all rows that share a block become one matrix, so that the block is read
once and not once a row, and its products are products of matrices. A row may see any number of blocks (a path through
a tree); the answers merge exactly by their log-sum-exps (kernels/merge.py). Every token of a block precedes
every query of its rows, so within a block nothing is causal.

Bytes: every block once, 2 * kv_heads * tokens * head_dim * element size, and queries and outputs once a block of
their rows, batch * heads * queries * (2 * head_dim * element size + 4). Flops 4 * heads * queries * head_dim *
(rows * tokens, summed over the blocks). That is rows * group flops a byte in 16 bits: bound by arithmetic from some
200 rows * group on (H200), by bandwidth below.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.kernels.attention import cpu_flash, slot_attention, slot_attention_reference
from kvcompress.kernels.merge import merge_states


class Sharing:
    """Which rows of a batch see which block.

    rows: for each block its rows, ascending; none for a block that waits. batch: rows in all; one may see no block.
    """

    def __init__(self, rows: Sequence[Sequence[int]], batch: int) -> None:
        self.rows = [list(block) for block in rows]
        self.batch = batch
        if any(not 0 <= row < batch for block in self.rows for row in block):
            raise ValueError(f"the rows of a block lie between 0 and {batch - 1}, got {self.rows}")

    @cached_property
    def levels(self) -> list[int]:
        """For each block the part of the result it goes to: no two blocks of a part share a row."""
        used = [0] * self.batch
        levels = []
        for block in self.rows:
            level = max((used[row] for row in block), default=-1)
            for row in block:
                used[row] = level + 1
            levels.append(level)
        return levels

    @cached_property
    def parts(self) -> int:
        """Parts a result has: the most blocks that one row sees."""
        return max(self.levels, default=-1) + 1

    def pick(self, block: int, device: torch.device) -> slice | Tensor:
        """What selects a block's rows from the batch: a slice where they stand side by side."""
        key = (block, device)
        if key not in self._picks:
            rows = self.rows[block]
            side_by_side = rows == list(range(rows[0], rows[0] + len(rows)))
            self._picks[key] = slice(rows[0], rows[-1] + 1) if side_by_side else torch.tensor(rows, device=device)
        return self._picks[key]

    def tensors(self) -> list[Tensor]:
        """What was made of the rows for devices."""
        return [pick for pick in self._picks.values() if isinstance(pick, Tensor)]

    @cached_property
    def _picks(self) -> dict[tuple[int, torch.device], slice | Tensor]:
        return {}


def prefix_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    sharing: Sharing,
    *,
    scale: float,
    starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row to all tokens of the blocks it sees.

    Args:
        query: [batch, heads, queries, head_dim].
        keys: of each block, [kv_heads, tokens, head_dim].
        values: of each block, [kv_heads, tokens, value_dim].
        sharing: the rows of each block.
        scale: factor of q.k.
        starts: the position of each block's first token; read only where there is a window.
        query_positions: [batch, queries] int32; read only where there is a window.
        window: a query sees positions greater than its own less `window`. None: all.
        softcap: bound of the logits. None: no bound.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries] float32; 0 and -inf for a row in no block.
    """
    _check(query, keys, values, sharing, starts, query_positions, window)
    outs: dict[int, Tensor] = {}
    lses: dict[int, Tensor] = {}
    for block, (key, value) in enumerate(zip(keys, values, strict=True)):
        if not sharing.rows[block]:
            continue
        rows = sharing.pick(block, query.device)
        relative = None
        if window is not None:
            assert starts is not None
            assert query_positions is not None
            relative = query_positions[rows].reshape(1, -1) - starts[block]
        outs[block], lses[block] = _one_block(query[rows], key, value, relative, scale, window, softcap)
    return merge_blocks(outs, lses, sharing, query, values[0].shape[-1] if values else query.shape[-1])


def prefix_attention_reference(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    sharing: Sharing,
    *,
    scale: float,
    starts: Sequence[int] | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What prefix_attention means: every row attends to its own copy of the blocks it sees."""
    out = query.new_zeros(*query.shape[:-1], values[0].shape[-1] if values else query.shape[-1])
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    for row in range(len(query)):
        blocks = [block for block, rows in enumerate(sharing.rows) if row in rows]
        if not blocks:
            continue
        key, value = (torch.cat([tensors[block] for block in blocks], 1)[None] for tensors in (keys, values))
        first = [0 if starts is None else starts[block] for block in blocks]
        places = torch.cat([torch.arange(keys[b].shape[1]) + start for b, start in zip(blocks, first, strict=True)])
        positions = places.to(query.device, torch.int32).expand(1, key.shape[1], -1)
        at = query.new_zeros(1, query.shape[2]) if query_positions is None else query_positions[row : row + 1]
        out[row], lse[row] = (
            part[0]
            for part in slot_attention_reference(
                query[row : row + 1], key, value, positions, at, scale=scale, window=window, softcap=softcap
            )
        )
    return out, lse


def merge_blocks(
    outs: dict[int, Tensor], lses: dict[int, Tensor], sharing: Sharing, query: Tensor, value_dim: int
) -> tuple[Tensor, Tensor]:
    """The merged answers of blocks, given by block for its rows, [rows, heads, queries, value_dim] and less that."""
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of the rows [rows, heads, queries, head_dim] of one block, as one matrix a KV head."""
    rows, heads, queries, head_dim = query.shape
    kv_heads, tokens, value_dim = value.shape
    if tokens == 0:
        return query.new_zeros(rows, heads, queries, value_dim), query.new_full(
            (rows, heads, queries), -torch.inf, dtype=torch.float32
        )
    if window is None and softcap is None and not query.is_cuda and key.shape[-1] == value_dim:
        matrix = query.reshape(rows, kv_heads, -1, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
        out, lse = cpu_flash(matrix, key[None], value[None], scale)
        out = out.reshape(kv_heads, rows, -1, queries, value_dim).transpose(0, 1)
        lse = lse.reshape(kv_heads, rows, -1, queries).transpose(0, 1)
        return out.reshape(rows, heads, queries, value_dim), lse.reshape(rows, heads, queries)
    positions = torch.arange(tokens, dtype=torch.int32, device=query.device).expand(1, kv_heads, -1)
    together = query.transpose(0, 1).reshape(1, heads, rows * queries, head_dim)
    at = positions[:, 0, :1] if relative is None else relative
    out, lse = slot_attention(
        together, key[None], value[None], positions, at, scale=scale, window=window, softcap=softcap
    )
    out, lse = (part[0].unflatten(1, (rows, queries)).transpose(0, 1).contiguous() for part in (out, lse))
    return out, lse


def _check(query, keys, values, sharing, starts, query_positions, window) -> None:
    if len(query) != sharing.batch or len(keys) != len(sharing.rows) or len(values) != len(keys):
        raise ValueError(
            f"prefix_attention needs a key and a value for each of {len(sharing.rows)} blocks and queries of "
            f"{sharing.batch} rows; got {len(keys)} keys, {len(values)} values and query {list(query.shape)}"
        )
    for key, value in zip(keys, values, strict=True):
        if key.shape[:2] != value.shape[:2] or key.shape[-1] != query.shape[-1] or query.shape[1] % key.shape[0]:
            raise ValueError(
                "prefix_attention needs query [batch, heads, queries, head_dim], keys [kv_heads, tokens, head_dim] and "
                "values [kv_heads, tokens, value_dim] with heads a multiple of kv_heads; got "
                f"query {list(query.shape)}, a key {list(key.shape)} and a value {list(value.shape)}"
            )
    if window is not None and (starts is None or query_positions is None):
        raise ValueError("prefix_attention needs starts and query_positions where there is a window")
