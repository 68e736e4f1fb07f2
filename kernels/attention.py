"""Exact attention that also reports its log-sum-exp, over a causal chunk or over unordered cache slots.

The log-sum-exp is what makes partial attentions mergeable (kernels/merge.py) and lets a second pass
recompute any probability, `exp(logit - lse)`, without a queries x tokens tensor (kernels/column_sums.py).

    logit = scale * q.k        or, with a softcap c,        c * tanh(scale * q.k / c)
    lse = log(sum(exp(logit)))        out = sum(exp(logit - lse) * v)

Flops 4 * batch * heads * (query, key) pairs * head_dim. Bytes: queries and outputs once, keys and values
once a query block (causal) or once (slots, decode).

All log-sum-exps are natural logarithms in float32; a query that sees no key has lse = -inf and out = 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.kernels.merge import merge_states

# logits a block of the CPU path may hold: 2 MB in float32, about one core's share of the cache
_BLOCK_LOGITS = 2**19


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last tokens of a chunk to the chunk, each to itself and what stands before it.

    Args:
        query: [batch, heads, queries, head_dim]; query i is token `tokens - queries + i`.
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        scale: factor of q.k.
        visible: [batch, tokens] bool; False marks padding, which no query sees. None: all are visible.
        window: a query sees the last `window` tokens, itself included. None: all before it.
        softcap: bound of the logits. None: no bound.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    _check(query, key, value)
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"causal_attention needs at most as many queries as tokens, got {query.shape[2]} and {key.shape[2]}"
        )
    window = None if window is None or window >= key.shape[2] else window
    if softcap is not None or window is not None or key.shape[-1] != value.shape[-1]:
        return _causal_blocks(query, key, value, scale, visible, window, softcap)
    return _causal_flash(query, key, value, scale, visible)


def causal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What causal_attention means, in plain PyTorch."""
    logits = _logits(query, key, scale, softcap)
    seen = _causal_mask(query.shape[2], key.shape[2], 0, key.shape[2], window, query.device)
    if visible is not None:
        seen = seen & visible[:, None, None, None, :]
    return _softmax_reference(logits.masked_fill(~seen, -torch.inf), value, query)


def slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to cached tokens that lie in slots of any order, some of them empty.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        value: [batch, kv_heads, slots, value_dim].
        positions: [batch, kv_heads, slots] int32, the position of each slot's token, at most that of every
            query; -1 marks an empty slot.
        query_positions: [batch, queries] int32; read only where there is a window.
        scale: factor of q.k.
        window: a query sees positions greater than its own less `window`. None: all.
        softcap: bound of the logits. None: no bound.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    _check(query, key, value)
    if softcap is not None or window is not None or key.shape[-1] != value.shape[-1]:
        return _slot_blocks(query, key, value, positions, query_positions, scale, window, softcap)
    return _slot_flash(query, key, value, positions, scale)


def slot_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What slot_attention means, in plain PyTorch."""
    logits = _logits(query, key, scale, softcap)
    seen = slots_seen(positions, query_positions, window)[:, :, None]
    return _softmax_reference(logits.masked_fill(~seen, -torch.inf), value, query)


def slots_seen(positions: Tensor, query_positions: Tensor, window: int | None) -> Tensor:
    """Which slots a query sees, [batch, kv_heads, queries or 1, slots]; one row for all queries without a window."""
    occupied = (positions >= 0)[:, :, None, :]
    if window is None:
        return occupied
    return occupied & (positions[:, :, None, :] > query_positions[:, None, :, None] - window)


def causal_blocks(
    query: Tensor, key: Tensor, scale: float, visible: Tensor | None, window: int | None, softcap: float | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Masked logits of a causal chunk, a block of queries at a time.

    Yields:
        The block's queries, the tokens they may see, and the logits, -inf where unseen,
        [batch, kv_heads, group, block, tokens of the block] in float32.
    """
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    block = _block(batch * heads, queries, min(tokens, window or tokens))
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        first = tokens - queries + start
        low = 0 if window is None else max(0, first - window + 1)
        rows, columns = slice(start, stop), slice(low, first + stop - start)
        logits = _logits(query[:, :, rows], key[:, :, columns], scale, softcap)
        seen = _causal_mask(stop - start, columns.stop - low, 0, columns.stop - low, window, query.device)
        if visible is not None:
            seen = seen & visible[:, None, None, None, columns]
        yield rows, columns, logits.masked_fill_(~seen, -torch.inf)


def slot_blocks(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Masked logits over slots, a block of queries at a time: the queries and
    [batch, kv_heads, group, block, slots] in float32."""
    batch, heads, queries, _ = query.shape
    block = _block(batch * heads, queries, key.shape[2])
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        logits = _logits(query[:, :, rows], key, scale, softcap)
        seen = slots_seen(positions, query_positions[:, rows], window)[:, :, None]
        yield rows, logits.masked_fill_(~seen, -torch.inf)


def _block(rows: int, queries: int, tokens: int) -> int:
    return min(queries, max(16, _BLOCK_LOGITS // max(1, rows * tokens)))


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if (
        query.shape[0] != key.shape[0]
        or query.shape[-1] != key.shape[-1]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "attention needs query [batch, heads, queries, head_dim], key [batch, kv_heads, tokens, head_dim] and value "
            "[batch, kv_heads, tokens, value_dim] with heads a multiple of kv_heads; got "
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        )


def _logits(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[batch, kv_heads, group, queries, tokens], float32."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    rows = query.float().reshape(batch, kv_heads, -1, head_dim)
    logits = (rows @ key.float().mT).mul_(scale).view(batch, kv_heads, heads // kv_heads, queries, tokens)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _causal_mask(queries: int, tokens: int, low: int, high: int, window: int | None, device: torch.device) -> Tensor:
    token = torch.arange(low, high, device=device)
    query = torch.arange(tokens - queries, tokens, device=device)[:, None]
    seen = token <= query
    return seen if window is None else seen & (token > query - window)


def _softmax_reference(logits: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _softmax(logits, value)
    return out.reshape(*query.shape[:-1], -1).to(query.dtype), lse.reshape(query.shape[:-1])


def _softmax(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [batch, kv_heads, group, queries, value_dim] and lse [batch, kv_heads, group, queries] of masked logits."""
    lse = logits.logsumexp(-1)
    # a query that sees nothing: shifting by 0 keeps exp(-inf - shift) = 0 and not NaN
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ value.float()[:, :, None], lse


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse.float()


def _causal_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None):
    queries, tokens = query.shape[2], key.shape[2]
    past = tokens - queries
    bias = None
    if visible is not None:
        bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)[:, None, None, :]
        bias = bias.expand(-1, 1, queries, -1)
    out, lse = _flash(
        query, key[:, :, past:], value[:, :, past:], scale, True, None if bias is None else bias[..., past:]
    )
    if visible is not None:
        out, lse = _empty_rows(out, lse, (visible[:, past:].cumsum(-1) > 0)[:, None])
    if past:
        earlier = _flash(
            query, key[:, :, :past], value[:, :, :past], scale, False, None if bias is None else bias[..., :past]
        )
        if visible is not None:
            earlier = _empty_rows(*earlier, visible[:, :past].any(-1)[:, None, None])
        out, lse = merge_states([earlier[0], out], [earlier[1], lse])
    return out, lse


def _slot_flash(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    # the heads of a group become more queries of their kv head: keys are read once a group
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    bias = torch.zeros_like(positions, dtype=query.dtype).masked_fill_(positions < 0, -torch.inf)[:, :, None, :]
    out, lse = _flash(rows, key, value, scale, False, bias.expand(-1, -1, rows.shape[2], -1))
    out, lse = _empty_rows(out, lse, (positions >= 0).any(-1)[..., None])
    return out.reshape(*query.shape[:-1], -1), lse.reshape(batch, heads, queries)


def _empty_rows(out: Tensor, lse: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """torch's kernel reports 0 for a query that sees nothing; seen is [batch, heads or 1, queries or 1] bool."""
    return out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, -torch.inf)


def _causal_blocks(query, key, value, scale, visible, window, softcap):
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, columns, logits in causal_blocks(query, key, scale, visible, window, softcap):
        block_out, block_lse = _softmax(logits, value[:, :, columns])
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse


def _slot_blocks(query, key, value, positions, query_positions, scale, window, softcap):
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, logits in slot_blocks(query, key, positions, query_positions, scale, window, softcap):
        block_out, block_lse = _softmax(logits, value)
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse
