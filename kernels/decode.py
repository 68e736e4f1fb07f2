"""One decode step over cache slots: attention, and the attention each slot received, in one pass.

Bytes 2 * batch * kv_heads * slots * head_dim * element size + 8 * batch * kv_heads * slots;
flops 4 * batch * heads * slots * head_dim: bound by bandwidth. Reading `budget` slots in place of
`tokens` is the speed-up over a full cache, tokens / budget at best.
"""

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention_reference, slots_seen
from kvcompress.kernels.column_sums import slot_column_sums_reference


def decode_attention(
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
    """Attention of one new token to the cache slots, its own among them.

    Args:
        query: [batch, heads, 1, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        value: [batch, kv_heads, slots, value_dim].
        positions: [batch, kv_heads, slots] int32, -1 marks an empty slot.
        query_positions: [batch, 1] int32; read only where there is a window.
        scale, window, softcap: as in slot_attention.

    Returns:
        The output, [batch, heads, 1, value_dim] in query's dtype, and the probabilities summed over the
        query heads of each group, [batch, kv_heads, slots] float32. A query that sees no slot gives 0.
    """
    batch, heads, queries, head_dim = query.shape
    if queries != 1:
        raise ValueError(f"decode_attention takes one query a sequence, got query {list(query.shape)}")
    kv_heads = key.shape[1]
    rows = query.view(batch, kv_heads, heads // kv_heads, head_dim) * scale
    logits = (rows @ key.mT).float()  # [batch, kv_heads, group, slots]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    seen = slots_seen(positions, query_positions, window)
    # a finite floor: a query that sees nothing gets a flat softmax and not NaN, and the mask then clears it
    probabilities = logits.masked_fill_(~seen, -1e30).softmax(-1).masked_fill_(~seen, 0.0)
    out = probabilities.to(value.dtype) @ value
    return out.view(batch, heads, 1, -1).to(query.dtype), probabilities.sum(2)


def decode_attention_reference(
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
    """What decode_attention means, in plain PyTorch."""
    how = {"scale": scale, "window": window, "softcap": softcap}
    out, lse = slot_attention_reference(query, key, value, positions, query_positions, **how)
    return out, slot_column_sums_reference(query, key, positions, query_positions, lse, **how)
