"""Fits what is kept of a text to what the whole text answered (Attention Matching, arXiv:2602.16284).

Queries q_i of the second reading attend to the text's tokens with weights e[i, j] = exp(logit[i, j] - lse[i]), where
lse[i] is over the whole text. Of a block of tokens, those kept get

    w = argmin over w in [exp(-3), exp(3)] of  sum_i (sum_kept e[i, j] w[j] - sum_all e[i, j])**2     bias += log w
    v = argmin over v of  sum_i |X v - sum_all e[i, j] v[j]|**2 + damping |v - v_kept|**2
        where  X[i, j] = e[i, j] w[j] * mass[i] / sum_kept e[i, j] w[j]

A block is the tokens read again together, or the slots of earlier texts. Everything is accumulated over tiles of
queries: memory is [kept, kept] per head, and a tile of queries times a block. Heads that keep about as many tokens are
fitted together. A head that keeps a whole block is left
exactly as it is, and so is one whose equations have no finite solution.

Flops per head, with n queries times group, b tokens of a block and k of them kept: 4 n b head_dim + 4 n k**2, and
2 n k head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.layer import AttentionInput
from kvcompress.storage.columns import marked_first
from kvcompress.storage.padding import reordered

# bounds of log w; the paper's
_MOST = 3.0
_STEPS = 20
# relative to the mean of the diagonals
_DAMPING_OF_WEIGHTS, _DAMPING_OF_VALUES = 1e-3, 1e-3
# queries times group in a tile
TILE = 512


@dataclass(frozen=True)
class Asked:
    """Queries of one chunk of a second reading.

    query: [batch, heads, queries, head_dim]. lse: [batch, heads, queries] float32, over the text; inf where a row has
    fewer queries, or one sees nothing.
    """

    query: Tensor
    lse: Tensor

    @classmethod
    def spread(cls, chunk: AttentionInput, visible: Tensor, lse: Tensor, most: int) -> "Asked":
        """At most so many of a chunk's queries, evenly spread over each row's own tokens, [batch, tokens] bool."""
        own = visible.sum(-1)
        first = visible.to(torch.uint8).argmax(-1)
        stride = -(-own // most).clamp(max=-1)
        count = min(most, visible.shape[1])
        at = torch.arange(count, device=own.device) * stride[:, None]
        there = at < own[:, None]
        at = (first[:, None] + at).clamp(max=visible.shape[1] - 1)
        index = at[:, None].expand(-1, lse.shape[1], -1)
        lse = lse.gather(2, index).masked_fill(~there[:, None], torch.inf)
        query = chunk.query.gather(2, index[..., None].expand(-1, -1, -1, chunk.query.shape[-1]))
        return cls(query, lse.masked_fill(lse == -torch.inf, torch.inf))

    def of_heads(self, kv_heads: int, rows: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scaled queries [rows, queries times group, head_dim] and lse [rows, queries times group] of some KV heads.

        Args:
            rows: their numbers, of the KV heads of all sequences.
        """
        query, lse = (x.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)[rows] for x in (self.query, self.lse))
        return query.to(dtype) * scale, lse.to(dtype)

    @classmethod
    def some(cls, asked: "list[Asked]") -> "Asked":
        """As many as a chunk has, of all: of a row with n chunks every nth, whatever the rows beside it have."""
        if len(asked) == 1:
            return asked[0]
        theirs = [(each.lse != torch.inf).any(1) for each in asked]
        chunks = torch.stack([own.any(-1) for own in theirs], -1).sum(-1, keepdim=True)
        number = torch.cat([torch.arange(own.shape[1], device=own.device) for own in theirs])
        # [batch, queries of all chunks]
        chosen = torch.cat(theirs, 1) & (number % chunks.clamp(min=1) == 0)
        order = marked_first(chosen)[:, : int(chosen.sum(-1).max())]
        lse = torch.cat([each.lse for each in asked], 2).masked_fill(~chosen[:, None], torch.inf)
        lse = lse.gather(2, order[:, None].expand(-1, lse.shape[1], -1))
        return cls(reordered(torch.cat([each.query for each in asked], 2), order), lse)


def match(
    asked: list[Asked],
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    blocks: Tensor,
    kept: Tensor,
    spec: LogitSpec,
) -> tuple[Tensor, Tensor]:
    """Values and log-weights with which the tokens kept answer for all.

    Args:
        asked: the queries of each chunk of the second reading.
        key, value: of all tokens, [batch, kv_heads, tokens, head_dim].
        bias: their log-weights, [batch, kv_heads, tokens] float32.
        blocks: [batch, kv_heads, tokens] int64, 0 for tokens of earlier texts, 1 + n for those of chunk n, -1 for none.
        kept: [batch, kv_heads, tokens] bool.
        spec: how logits are made; without a window.

    Returns:
        As value and bias, changed for tokens kept.
    """
    # heads of all sequences, as one dimension
    keys, values, weights = key.flatten(0, 1), value.flatten(0, 1).clone(), bias.flatten(0, 1).clone()
    for block, questions in enumerate([Asked.some(asked), *asked]):
        there = (blocks == block).flatten(0, 1)
        own = there & kept.flatten(0, 1)
        counts = own.sum(-1)
        # a head that keeps all of a block, or nothing, has nothing to fit; others go with those that keep about as many
        sizes = torch.where((counts > 0) & (there.sum(-1) > counts), counts, 0).clamp(min=0.5).log2().mul(2).floor()
        for size in sizes[sizes >= 0].unique().tolist():
            (rows,) = (sizes == size).nonzero(as_tuple=True)
            index = marked_first(there[rows])[:, : int(there[rows].sum(-1).max())]
            among = questions.of_heads(key.shape[1], rows, spec.scale, torch.promote_types(value.dtype, torch.float32))
            at = rows[:, None], index
            fresh, added = _match_heads(*among, keys[at], values[at], there[at], own[at], weights[at], spec)
            values[at], weights[at] = fresh, added
    return values.view_as(value), weights.view_as(bias)


def _match_heads(
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    there: Tensor,
    kept: Tensor,
    bias: Tensor,
    spec: LogitSpec,
) -> tuple[Tensor, Tensor]:
    """As `match`, of some heads and one block.

    Args:
        query: [heads, queries times group, head_dim], scaled. lse: [heads, queries times group].
        key, value: of the block's tokens, [heads, tokens, head_dim]. there, kept, bias: [heads, tokens].
    """
    dtype, counts = query.dtype, kept.sum(-1)
    chosen = marked_first(kept)[:, : int(counts.max())]
    is_chosen = kept.gather(1, chosen)
    columns, all_values = key.to(dtype).mT, value.to(dtype)
    old = all_values.gather(1, chosen[..., None].expand(-1, -1, value.shape[-1]))
    offset = bias.to(dtype).masked_fill(~there, -torch.inf)[:, None]

    def tiles() -> Iterator[tuple[Tensor, Tensor]]:
        """The weights of all tokens, and of those kept, for some queries at a time."""
        for start in range(0, query.shape[1], TILE):
            part = slice(start, start + TILE)
            weights = (spec.cap_(query[:, part] @ columns) + offset - lse[:, part, None]).exp_()
            own = weights.gather(2, chosen[:, None].expand(-1, weights.shape[1], -1))
            yield weights, own * is_chosen[:, None]

    gram, moment = _nothing(old, chosen.shape[-1]), _nothing(old, 1)
    for weights, own in tiles():
        gram += own.mT @ own
        moment += own.mT @ weights.sum(-1, keepdim=True)
    was_asked = gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
    factors = _bounded_least_squares(gram, moment, counts)
    spread, moments = _nothing(old, chosen.shape[-1]), _nothing(old, old.shape[-1])
    for weights, own in tiles():
        own = own * factors[:, None]
        own *= weights.sum(-1, keepdim=True) / own.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        spread += own.mT @ own
        moments += own.mT @ (weights @ all_values - own @ old)
    fresh, added = old + _solve(spread, moments, counts, _DAMPING_OF_VALUES), factors.log()
    is_finite = fresh.isfinite().all(-1).all(-1) & added.isfinite().all(-1)
    fits = (was_asked & is_finite)[:, None] & is_chosen
    new = torch.where(fits[..., None], fresh, old).to(value.dtype)
    added = torch.where(fits, added, 0.0).to(bias.dtype)
    return value.scatter(1, chosen[..., None].expand_as(new), new), bias.scatter_add(1, chosen, added)


def _nothing(like: Tensor, columns: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], columns)


def _bounded_least_squares(gram: Tensor, moment: Tensor, counts: Tensor) -> Tensor:
    """Weights within bounds, [heads, kept], that nearly minimise |M w - y|: gram M'M, moment M'y."""
    low, high = torch.tensor(-_MOST).exp().item(), torch.tensor(_MOST).exp().item()
    # damped towards 1, which what no query asks for keeps
    change = _solve(gram, moment - gram.sum(-1, keepdim=True), counts, _DAMPING_OF_WEIGHTS)
    weights = (1.0 + change).clamp(low, high)
    # no eigenvalue is above the largest sum of a row
    rate = 1.0 / gram.sum(-1).amax(-1).clamp(min=torch.finfo(gram.dtype).tiny)[..., None, None]
    for _ in range(_STEPS):
        weights = (weights - rate * (gram @ weights - moment)).clamp(low, high)
    return weights[..., 0]


def _solve(gram: Tensor, moments: Tensor, counts: Tensor, damping: float) -> Tensor:
    """Solutions of damped normal equations, [heads, kept, any]: more damping where rounding asks for it."""
    mean = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.clamp(min=1)
    strength = (damping * mean).clamp(min=torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + strength[..., None, None] * eye)
        failed = (failed > 0) & gram.isfinite().all(-1).all(-1)
        if not bool(failed.any()):
            return torch.cholesky_solve(moments, factor)
        strength = torch.where(failed, 10 * strength, strength)
