"""Attention of each query to tokens that were chosen for it (DeepSeek Sparse Attention, arXiv:2512.02556).

What is chosen is told by the tokens' positions in their sequences, so it means the same wherever a token lies: in
order, in slots, or in codes that are decoded a piece at a time. A query attends to those of its tokens that are here.

    out = sum(exp(logit - lse) * v),  lse = log(sum(exp(logit)))        over the tokens that are chosen and here

KV heads may hold different tokens, of which different ones are chosen: each is then a sequence of its own.

In PyTorch, some queries at a time, so that no queries x tokens mask outlives its queries. Where a few of many tokens
are chosen they are gathered first, and nothing else is read: bytes queries * chosen * (head_dim + value_dim), flops
4 * heads * queries * chosen * head_dim. Else all pairs are computed.

All log-sum-exps are natural logarithms in float32; a query that sees no token has lse = -inf and out = 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.torch_attention import query_logits, softmax_values

# numbers that what is made for some queries may hold; on a GPU enough to fill it
_MOST = 2**22
_MOST_ON_GPU = 2**26
# so many times as many tokens as are chosen are worth a gather
_SPARSE = 4


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, chosen: Tensor, spec: LogitSpec
) -> tuple[Tensor, Tensor]:
    """Attention of queries to their tokens.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        positions: [batch or 1, tokens] int32, of the tokens in their sequences, in any order; -1 for no token. With
            heads that hold different ones [batch, kv_heads, tokens].
        chosen: [batch, queries, choices] int32, positions of the tokens that a query sees, none twice; -1 for none.
            With different ones for each head [batch, kv_heads, queries, choices].

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    if _differs(positions, chosen):
        batch, kv_heads = key.shape[:2]
        query, key, value = _by_head(query, key, value)
        found = sparse_attention(query, key, value, *_of_heads(positions, chosen, batch, kv_heads), spec)
        out, lse = (each.unflatten(0, (batch, kv_heads)).flatten(1, 2) for each in found)
        return out, lse
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    for rows, columns, logits in _blocks(query, key, positions, chosen, spec):
        if columns is None:
            block_out, block_lse = softmax_values(logits, value)
            block_out, block_lse = block_out.flatten(1, 2), block_lse.flatten(1, 2)
        else:
            taken = _gathered(value, columns)
            # [batch, kv_heads, block, group, choices] against [batch, kv_heads, block, choices, value_dim]
            by_query = logits.permute(0, 1, 3, 2, 4)
            block_lse = by_query.logsumexp(-1)
            weights = (by_query - block_lse.masked_fill(block_lse == -torch.inf, 0.0)[..., None]).exp()
            block_out = (weights @ taken.float()).transpose(2, 3).flatten(1, 2)
            block_lse = block_lse.transpose(2, 3).flatten(1, 2)
        out[:, :, rows], lse[:, :, rows] = block_out.to(out.dtype), block_lse
    return out, lse


def sparse_column_sums(
    query: Tensor, key: Tensor, positions: Tensor, chosen: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """The attention that each token received from these queries, summed over a group's heads.

    Args:
        query, key, positions, chosen: as in `sparse_attention`.
        lse: [batch, heads, queries] float32, of the queries, over all they see; inf for a query that is left out.

    Returns:
        [batch, kv_heads, tokens] float32.
    """
    if _differs(positions, chosen):
        batch, kv_heads = key.shape[:2]
        query, key, _ = _by_head(query, key, key)
        positions, chosen = _of_heads(positions, chosen, batch, kv_heads)
        lse = lse.unflatten(1, (kv_heads, -1)).flatten(0, 1)
        sums = sparse_column_sums(query, key, positions, chosen, lse, spec)
        return sums.view(batch, kv_heads, -1)
    sums = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for rows, columns, logits in _blocks(query, key, positions, chosen, spec):
        shift = lse[:, :, rows].unflatten(1, (key.shape[1], -1))[..., None]
        # a query that sees nothing has no lse either
        given = (logits - shift.masked_fill(shift == -torch.inf, torch.inf)).exp().sum(2)
        if columns is None:
            sums += given.sum(2)
        else:
            # a place without a token gives nothing, wherever it is added
            at = columns.clamp(min=0)[:, None].expand(-1, key.shape[1], -1, -1)
            sums.scatter_add_(2, at.flatten(2), given.flatten(2))
    return sums


def sparse_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, chosen: Tensor, spec: LogitSpec
) -> tuple[Tensor, Tensor]:
    """What sparse_attention means, in plain PyTorch."""
    logits = query_logits(query, key, spec)
    out, lse = softmax_values(logits.masked_fill(~_seen(positions, chosen), -torch.inf), value)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def sparse_column_sums_reference(
    query: Tensor, key: Tensor, positions: Tensor, chosen: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """What sparse_column_sums means, in plain PyTorch."""
    logits = query_logits(query, key, spec)
    shift = lse.unflatten(1, (key.shape[1], -1))[..., None]
    return torch.where(_seen(positions, chosen), (logits - shift).exp(), 0.0).sum((2, 3))


def _seen(positions: Tensor, chosen: Tensor) -> Tensor:
    """Whether queries see tokens, [batch, 1 or kv_heads, 1, queries, tokens]."""
    positions = positions if positions.dim() == 3 else positions[:, None]
    chosen = chosen if chosen.dim() == 4 else chosen[:, None]
    equal = positions[:, :, None, :, None] == chosen[:, :, :, None]
    return (equal & (chosen >= 0)[:, :, :, None]).any(-1)[:, :, None]


def _differs(positions: Tensor, chosen: Tensor) -> bool:
    """Whether tokens, or what is chosen, may differ between KV heads."""
    return positions.dim() == 3 or chosen.dim() == 4


def _by_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KV heads, with the query heads of each, as so many sequences of one KV head."""
    query = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    return query, key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]


def _of_heads(positions: Tensor, chosen: Tensor, batch: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Positions and choices of as many sequences as there are KV heads in all."""
    positions = positions if positions.dim() == 3 else positions[:, None]
    chosen = chosen if chosen.dim() == 4 else chosen[:, None]
    positions, chosen = positions.expand(batch, kv_heads, -1), chosen.expand(batch, kv_heads, -1, -1)
    return positions.flatten(0, 1), chosen.flatten(0, 1)


def _blocks(
    query: Tensor, key: Tensor, positions: Tensor, chosen: Tensor, spec: LogitSpec
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Masked logits, some queries at a time.

    Yields:
        The block's queries; the columns of `key` that are gathered for each, [batch, block, choices], -1 for none, or
        None for all; and logits [batch, kv_heads, group, block, choices or tokens], -inf where unseen.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens, choices = key.shape[1], key.shape[2], chosen.shape[2]
    if not tokens:
        return
    columns = _columns(positions.expand(batch, -1), chosen)
    is_sparse = choices * _SPARSE <= tokens
    each = choices * max(heads, 2 * kv_heads * head_dim) if is_sparse else tokens * heads
    block = max(1, (_MOST_ON_GPU if query.is_cuda else _MOST) // (batch * each))
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        own = columns[:, rows]
        if is_sparse:
            asked = query[:, :, rows].float().unflatten(1, (kv_heads, -1)).transpose(2, 3)
            logits = (asked @ _gathered(key, own).float().mT).mul_(spec.scale)
            logits = spec.cap_(logits).transpose(2, 3)
            yield rows, own, logits.masked_fill(own[:, None, None] < 0, -torch.inf)
        else:
            seen = torch.zeros(*own.shape[:2], tokens + 1, dtype=torch.bool, device=key.device)
            # what is not here goes to a column more
            seen.scatter_(2, own.masked_fill(own < 0, tokens), True)
            logits = query_logits(query[:, :, rows], key, spec)
            yield rows, None, logits.masked_fill_(~seen[:, None, None, :, :tokens], -torch.inf)


def _columns(positions: Tensor, chosen: Tensor) -> Tensor:
    """Where chosen tokens lie among those at these positions, [batch, queries, choices] int64, -1 for not here."""
    batch, tokens = positions.shape
    # as far as they reach: no more than are asked for, and one place for those without a token
    most = int(torch.maximum(positions.amax(), chosen.amax())) + 1 if chosen.numel() else 0
    column = torch.arange(tokens, device=positions.device).expand(batch, -1)
    table = torch.full((batch, most + 1), -1, dtype=torch.int64, device=positions.device)
    table.scatter_(1, positions.long().masked_fill(positions < 0, most), column)
    table[:, most] = -1
    flat = chosen.flatten(1).long()
    return table.gather(1, flat.masked_fill(flat < 0, most)).view(chosen.shape)


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens of [batch, kv_heads, tokens, any] in these columns, [batch, kv_heads, block, choices, any]."""
    _, kv_heads, _, width = x.shape
    at = columns.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, kv_heads, -1, width)
    taken: Tensor = x.gather(2, at).unflatten(2, columns.shape[1:])
    return taken
