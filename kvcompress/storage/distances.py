"""Attention whose logits have biases by distance, that each query makes for itself (Inkling).

    logit[i, j] = scale * q_i.k_j + bias_i[d]        d = column of i - column of j, and no bias for d >= extent

Biases are [batch, heads, queries, extent], and become part of logits a block of queries at a time. Columns count the
padding between tokens, as such models do, and so do their windows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.torch_attention import slot_blocks, softmax_values


def attend_by_distance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    spec: LogitSpec,
    biases: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention to tokens in any order, to none after a query.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, tokens, head_dim]. value: [batch, kv_heads, tokens, value_dim].
        columns: [batch or 1, kv_heads or 1, tokens] int32, of the tokens; negative where there is none.
        query_columns: [batch or 1, queries] int32.
        biases: [batch, heads, queries, extent].

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp, [batch, heads, queries].
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, logits in _blocks(query, key, columns, query_columns, spec, biases):
        block_out, block_lse = softmax_values(logits, value)
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse


def sums_by_distance(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    lse: Tensor,
    spec: LogitSpec,
    biases: Tensor,
) -> Tensor:
    """The attention that each token received, [batch, kv_heads, tokens] float32.

    Args:
        lse: [batch, heads, queries], over all that a query saw; one with inf or -inf is left out.
    """
    sums = key.new_zeros(key.shape[:3], dtype=torch.float32)
    for rows, logits in _blocks(query, key, columns, query_columns, spec, biases):
        own = lse[:, :, rows].unflatten(1, (key.shape[1], -1))[..., None]
        sums += torch.where(own.isinf(), 0.0, (logits - own).exp()).sum((2, 3))
    return sums


def _blocks(
    query: Tensor, key: Tensor, columns: Tensor, query_columns: Tensor, spec: LogitSpec, biases: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """A block of queries, and its logits, [batch, kv_heads, group, block, tokens], -inf where unseen."""
    extent = biases.shape[-1]
    by_head = biases.float().unflatten(1, (key.shape[1], -1))
    for rows, logits in slot_blocks(query, key, columns, query_columns, spec, causal=True):
        distance = (query_columns[:, None, rows, None] - columns[:, :, None]).long()[:, :, None]
        own = by_head[:, :, :, rows].gather(-1, distance.clamp(0, extent - 1).expand_as(logits))
        yield rows, logits.add_(own.masked_fill_((distance < 0) | (distance >= extent), 0.0))
