"""Blocks of keys that several rows of a batch share, which rows see which, and the tiles of a kernel that follow."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.tile import rows_aligned


class KeyBlocks:
    """Blocks of keys and values, each a tensor of its own; what a kernel needs to know about them is computed once.

    keys: [kv_heads, tokens, head_dim] each. values: [kv_heads, tokens, value_dim] each. starts: the position of each
    block's first token, read only where positions are.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], starts: Sequence[int] | None = None) -> None:
        self.keys, self.values = list(keys), list(values)
        self.starts = [0] * len(self.keys) if starts is None else list(starts)
        if not len(self.keys) == len(self.values) == len(self.starts):
            raise ValueError(
                f"{len(self.keys)} keys need as many values and starts, got {len(self.values)} and {len(self.starts)}"
            )
        for key, value in zip(self.keys, self.values, strict=True):
            if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2]:
                raise ValueError(
                    "blocks are keys [kv_heads, tokens, head_dim] and values [kv_heads, tokens, value_dim]; got "
                    f"{list(key.shape)} and {list(value.shape)}"
                )

    @functools.cached_property
    def laid_out(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Keys and values with rows that kernels can load 16 bytes at a time, and a row of facts for each block, and
        for one without tokens: [blocks + 1, 6] int64, the two addresses, elements from one head to the next in both,
        tokens and start."""
        keys, values = ([_packed_rows(tensor) for tensor in tensors] for tensors in (self.keys, self.values))
        facts = [
            [key.data_ptr(), value.data_ptr(), key.stride(0), value.stride(0), key.shape[1], start]
            for key, value, start in zip(keys, values, self.starts, strict=True)
        ]
        return keys, values, torch.tensor([*facts, [0] * 6], dtype=torch.int64).to(keys[0].device)

    def tensors(self) -> list[Tensor]:
        """What was made for kernels and is not the blocks themselves."""
        if "laid_out" not in self.__dict__:
            return []
        keys, values, facts = self.laid_out
        given = {tensor.data_ptr() for tensor in (*self.keys, *self.values)}
        return [facts, *(tensor for tensor in (*keys, *values) if tensor.data_ptr() not in given)]


def _packed_rows(tensor: Tensor) -> Tensor:
    """The tensor [kv_heads, tokens, dim] with aligned rows, one behind the other within a head."""
    tensor = rows_aligned(tensor)
    return tensor if tensor.stride(1) == tensor.shape[-1] else tensor.contiguous()


class Tiles(NamedTuple):
    """Who computes what: facts [tiles, 5] int32 (block, its first row in the tile, rows of the block, its first
    member, level) and members [sum of members] int32, the batch rows of all blocks one after the other. A row is
    one (member, query, head of a group). Batch rows that are in no block of a level are those of a block without
    tokens, the last one, so that every result is written."""

    facts: Tensor
    members: Tensor


class Sharing:
    """Which rows of a batch see which block.

    rows: the rows of each block, ascending; none for a block that no row sees yet. batch: number of rows; a row may see
    no block.
    """

    def __init__(self, rows: Sequence[Sequence[int]], batch: int) -> None:
        self.rows = [list(block) for block in rows]
        self.batch = batch
        if any(not 0 <= row < batch for block in self.rows for row in block):
            raise ValueError(f"the rows of a block lie between 0 and {batch - 1}, got {self.rows}")

    @functools.cached_property
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

    @functools.cached_property
    def parts(self) -> int:
        """Number of parts of a result: the most blocks that one row sees."""
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
        tables = [table for tiles in self._tiles.values() for table in tiles]
        return tables + [pick for pick in self._picks.values() if isinstance(pick, Tensor)]

    def tiles(self, each: int, block_rows: int, device: torch.device) -> Tiles:
        """Tiles of at most `block_rows` rows of one block; each: rows of a member, queries times group."""
        key = (each, block_rows, device)
        if key not in self._tiles:
            facts: list[list[int]] = []
            members: list[int] = []
            blocks = [*zip(range(len(self.rows)), self.rows, self.levels, strict=True)]
            for level in range(self.parts):
                within = {row for _, rows, of_level in blocks if of_level == level for row in rows}
                blocks.append((len(self.rows), [row for row in range(self.batch) if row not in within], level))
            for block, rows, level in blocks:
                for first in range(0, len(rows) * each, block_rows):
                    facts.append([block, first, len(rows) * each, len(members), level])
                members += rows
            self._tiles[key] = Tiles(
                torch.tensor(facts, dtype=torch.int32).to(device), torch.tensor(members, dtype=torch.int32).to(device)
            )
        return self._tiles[key]

    @functools.cached_property
    def _tiles(self) -> dict[tuple[int, int, torch.device], Tiles]:
        return {}

    @functools.cached_property
    def _picks(self) -> dict[tuple[int, torch.device], slice | Tensor]:
        return {}
