"""Column sums and maxima of the attention matrix in plain PyTorch, a tile at a time: column_sums' path on a CPU.

A tile is one matrix product that carries the log-sum-exp as an extra dimension, `[scale * q, -lse] . [k, 1]` in base 2,
then exp2 and a sum or a maximum in place, in a buffer sized for the cache.
"""

import math

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.torch_attention import slots_seen

# the lse of a query that is left out: exp(logit - lse) is 0 in float32, and no arithmetic makes NaN of it, as of inf
_IGNORED = 1e4
# torch's exp2 takes two thirds of the time of its exp
_LOG2E = math.log2(math.e)
_TILE_COLUMNS = 256
# of each thread, 1 MB in float32: near enough what a core's cache holds, few enough calls that their overhead does not
# show, and few tokens at the diagonal that a block's first queries do not see
_TILE_LOGITS = 2**18


def causal_tiles(query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec, visible: Tensor | None) -> Tensor:
    """As causal_column_sums."""
    queries, tokens, window = query.shape[2], key.shape[2], spec.window
    tiles = _Tiles(query, key, lse, spec)
    for start in range(0, queries, tiles.block):
        stop = min(start + tiles.block, queries)
        tiles.take(slice(start, stop))
        # the block's first query is token `first`, its last is token `last - 1`
        first, last = tokens - queries + start, tokens - queries + stop
        low = 0 if window is None else max(0, first - window + 1)
        for left in range(low, last, _TILE_COLUMNS):
            right = min(left + _TILE_COLUMNS, last)
            tile = tiles.probabilities(slice(left, right))
            if right > first + 1:
                tile.tril_(first - left)
            if window is not None and left <= last - 1 - window:
                tile.triu_(first - left - window + 1)
            tiles.sums[:, left:right] += tile.sum((1, 2))
    sums = tiles.sums.view(key.shape[:3]).float()
    return sums if visible is None else sums.masked_fill_(~visible[:, None], 0.0)


def slot_tiles(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    lse: Tensor,
    spec: LogitSpec,
    takes_max: bool,
) -> Tensor:
    """As slot_column_sums, or slot_column_maxima where it `takes_max`."""
    queries, slots = query.shape[2], key.shape[2]
    tiles = _Tiles(query, key, lse, spec)
    for start in range(0, queries, tiles.block):
        rows = slice(start, min(start + tiles.block, queries))
        tiles.take(rows)
        for left in range(0, slots, _TILE_COLUMNS):
            columns = slice(left, min(left + _TILE_COLUMNS, slots))
            tile = tiles.probabilities(columns)
            if spec.window is not None:
                seen = slots_seen(positions[..., columns], query_positions[:, rows], spec.window)
                tile.masked_fill_(~seen.flatten(0, 1)[:, None], 0.0)
            if takes_max:
                torch.maximum(tiles.sums[:, columns], tile.amax((1, 2)), out=tiles.sums[:, columns])
            else:
                tiles.sums[:, columns] += tile.sum((1, 2))
    return tiles.sums.view(key.shape[:3]).float().masked_fill_(positions < 0, 0.0)


class _Tiles:
    """Tiles of exp(logit - lse) in one buffer, and the sums or maxima they add to, [batch * kv_heads, tokens].

    Logits and log-sum-exps are in base 2.
    """

    def __init__(self, query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec) -> None:
        batch, heads, queries, _ = query.shape
        kv_heads, tokens = key.shape[1], key.shape[2]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = lse.masked_fill(lse.isinf(), _IGNORED).to(dtype)[..., None] * _LOG2E
        self.spec, self.lse = spec, None
        if spec.softcap is None:
            rows, columns = (x.new_empty(*x.shape[:-1], x.shape[-1] + 1, dtype=dtype) for x in (query, key))
            rows[..., :-1].copy_(query).mul_(spec.scale * _LOG2E)
            rows[..., -1:], columns[..., :-1], columns[..., -1] = -lse, key, 1.0
        else:
            rows, columns = query.to(dtype) * spec.scale, key.to(dtype)
            self.lse = lse.reshape(batch * kv_heads, heads // kv_heads, queries, 1)
        self.rows = rows.reshape(batch * kv_heads, heads // kv_heads, queries, -1)
        self.columns = columns.reshape(batch * kv_heads, tokens, -1)
        self.sums = self.columns.new_zeros(batch * kv_heads, tokens)
        logits = _TILE_LOGITS * torch.get_num_threads()
        self.block = min(queries, max(16, logits // (batch * heads * _TILE_COLUMNS)))
        self.taken: Tensor
        self.taken_lse: Tensor | None
        self.buffer = self.columns.new_empty(batch * heads * self.block * _TILE_COLUMNS)

    def take(self, rows: slice) -> None:
        """Chooses the queries of the tiles that follow."""
        self.taken = self.rows[:, :, rows].flatten(1, 2)
        self.taken_lse = None if self.lse is None else self.lse[:, :, rows]

    def probabilities(self, columns: slice) -> Tensor:
        """[batch * kv_heads, group, queries taken, columns], unmasked; the next call overwrites it."""
        pairs, count, _ = self.taken.shape
        width = columns.stop - columns.start
        tile = self.buffer[: pairs * count * width].view(pairs, count, width)
        torch.bmm(self.taken, self.columns[:, columns].mT, out=tile)
        tile = tile.view(pairs, self.rows.shape[1], -1, width)
        if self.taken_lse is not None:
            self.spec.cap_(tile).mul_(_LOG2E).sub_(self.taken_lse)
        return tile.exp2_()
