"""Column sums of the attention matrix: how much attention each token received (H2O, arXiv:2306.14048).

    sums[j] = sum over queries i, and over the query heads of j's group, of exp(logit[i, j] - lse[i])

The log-sum-exp comes from the attention pass, so probabilities are recomputed a tile at a time and the
queries x tokens matrix never exists. Flops 2 * batch * heads * (query, key) pairs * head_dim, half an
attention; bytes (heads + kv_heads) * head_dim a token and the lse.

On a CPU the sums come out of torch's fused attention with the roles swapped: with queries `[k_j, 1]` and
keys `[q_i, -lse_i / scale]` its log-sum-exp over i is `log(sums[j])`; with both sequences flipped,
`i >= j` is causal. One extra dimension, no extra pass.
"""

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_blocks, slot_blocks, slots_seen

# exp of it is 0 in float32, and a finite number survives the scaling that -inf does not
_IGNORED = 1e4


def causal_column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention received by each token of a chunk from the chunk's last queries.

    Args:
        query: [batch, heads, queries, head_dim]; query i is token `tokens - queries + i`.
        key: [batch, kv_heads, tokens, head_dim].
        lse: [batch, heads, queries] float32, over all keys the query saw, be they here or elsewhere.
            A query with lse of +inf or -inf is left out.
        scale, visible, window, softcap: as in causal_attention.

    Returns:
        [batch, kv_heads, tokens] float32; 0 for a token nobody sees.
    """
    window = None if window is None or window >= key.shape[2] else window
    if softcap is not None or window is not None:
        return _causal_blocks(query, key, lse, scale, visible, window, softcap)
    return _causal_flash(query, key, lse, scale, visible)


def causal_column_sums_reference(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What causal_column_sums means, in plain PyTorch."""
    queries, tokens, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    logits = (query.float() @ key.float().repeat_interleave(group, 1).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = torch.arange(tokens, device=key.device)
    index = token[tokens - queries :, None]
    seen = token <= index
    if window is not None:
        seen = seen & (token > index - window)
    if visible is not None:
        seen = seen & visible[:, None, None, :]
    seen = seen & lse.isfinite()[..., None]
    probabilities = torch.where(seen, (logits - lse[..., None]).exp(), 0.0)
    return probabilities.sum(2).unflatten(1, (-1, group)).sum(2)


def slot_column_sums(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention received by each cache slot from the queries.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        positions, query_positions, scale, window, softcap: as in slot_attention.
        lse: [batch, heads, queries] float32, over all keys the query saw, be they here or elsewhere.
            A query with lse of +inf or -inf is left out.

    Returns:
        [batch, kv_heads, slots] float32; 0 for an empty slot.
    """
    sums = key.new_zeros(key.shape[:3], dtype=torch.float32)
    shift = _finite(lse).unflatten(1, (key.shape[1], -1))
    for rows, logits in slot_blocks(query, key, positions, query_positions, scale, window, softcap):
        sums += (logits - shift[..., rows, None]).exp_().sum((2, 3))
    return sums


def slot_column_sums_reference(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What slot_column_sums means, in plain PyTorch."""
    group = query.shape[1] // key.shape[1]
    logits = (query.float() @ key.float().repeat_interleave(group, 1).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = slots_seen(positions, query_positions, window).repeat_interleave(group, 1) & lse.isfinite()[..., None]
    probabilities = torch.where(seen, (logits - lse[..., None]).exp(), 0.0)
    return probabilities.sum(2).unflatten(1, (-1, group)).sum(2)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(~lse.isfinite(), _IGNORED)


def _causal_flash(query: Tensor, key: Tensor, lse: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # a head_dim that stays a multiple of 16 keeps torch's kernel on its fast path;
    # float32 always, because 16 bits cannot carry the lse in one dimension
    padded = head_dim + 16
    seekers = key.new_zeros(batch * kv_heads, 1, tokens, padded, dtype=torch.float32)
    seekers[:, 0, :, :head_dim] = key.flip(2).flatten(0, 1)
    seekers[..., head_dim] = 1.0
    seekers = seekers.expand(-1, group, -1, -1)
    sought = query.new_zeros(batch, heads, queries, padded, dtype=torch.float32)
    sought[..., :head_dim] = query.flip(2)
    sought[..., head_dim] = _finite(lse).flip(2) / -scale
    sought = sought.view(batch * kv_heads, group, queries, padded)

    # flipped, the queries come first: a token among them is sought causally, an earlier one by all of them
    parts = [_log_sums(seekers[:, :, :queries], sought, scale, causal=True)]
    if tokens > queries:
        parts.append(_log_sums(seekers[:, :, queries:], sought, scale, causal=False))
    sums = torch.cat(parts, -1).exp_().sum(1).flip(-1).view(batch, kv_heads, tokens)
    return sums if visible is None else sums.masked_fill_(~visible[:, None], 0.0)


def _log_sums(seekers: Tensor, sought: Tensor, scale: float, causal: bool) -> Tensor:
    # only the lse is wanted; the keys serve as values, which costs no memory
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        seekers, sought, sought, 0.0, causal, scale=scale
    )
    return lse


def _causal_blocks(query, key, lse, scale, visible, window, softcap) -> Tensor:
    sums = key.new_zeros(key.shape[:3], dtype=torch.float32)
    shift = _finite(lse).unflatten(1, (key.shape[1], -1))
    for rows, columns, logits in causal_blocks(query, key, scale, visible, window, softcap):
        sums[:, :, columns] += (logits - shift[..., rows, None]).exp_().sum((2, 3))
    return sums
