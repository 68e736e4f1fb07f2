"""Attention to slots of which each KV head has another number: slot_attention and decode_attention in one launch.

Keys and values lie in rows, head after head in any order; `Extents` says where each head's are. A launch splits the
heads into parts of equally many slots, so that no head waits for the longest; programs behind the end of a shorter head
leave at once. Bytes: those of the slots there are, and positions only of these.
"""

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, AOT_HEAD_DIMS, op, shaped
from kvcompress.kernels.common.split_attention import Extents, launch_split, splits_in_triton
from kvcompress.kernels.decode import decode_attention_reference, launch_decode


@op(
    fake=lambda query, value, **_: (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )
)
def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """slot_attention where heads differ in how many slots they have.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [slots of all heads, head_dim].
        value: [slots of all heads, value_dim].
        positions: [batch, kv_heads, most slots of a head] int32, as in slot_attention; not read from a head's capacity
            on.
        query_positions: [batch, queries] int32; read only where there is a window.
        bias: [slots of all heads] float32, added to their logits as in slot_attention.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    _check(query, key, value, extents, positions)
    if not (splits_in_triton(query, key, value) and query.numel()):
        return ragged_attention_reference(query, key, value, extents, positions, query_positions, spec, bias)
    return launch_split(query, key, value, spec, None, positions, query_positions, bias, extents=extents)


def ragged_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ragged_attention means, in plain PyTorch."""
    even = padded(key, value, extents, positions)
    of_slots = None if bias is None else by_column(bias, extents, positions.shape[2])
    return slot_attention_reference(query, *even, query_positions, spec, of_slots)


@op(
    fake=lambda query, value, positions, **_: (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(positions.shape, dtype=torch.float32),
    )
)
def ragged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """decode_attention where heads differ in how many slots they have.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value, extents, positions: as in ragged_attention.
        query_positions: [batch, 1] int32; read only where there is a window.
        sink_logits: [heads], as in decode_attention.

    Returns:
        The output, [batch, heads, 1, value_dim] in query's dtype, and the probabilities summed over the query heads of
        each group, [batch, kv_heads, most slots of a head] float32, 0 from a head's capacity on.
    """
    _check(query, key, value, extents, positions)
    if query.shape[2] != 1:
        raise ValueError(f"ragged_decode_attention takes one query per sequence, got query {list(query.shape)}")
    if not (splits_in_triton(query, key, value) and query.numel()):
        return ragged_decode_attention_reference(
            query, key, value, extents, positions, query_positions, spec, sink_logits
        )
    return launch_decode(query, key, value, positions, query_positions, spec, sink_logits, extents)


def ragged_decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Extents,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ragged_decode_attention means, in plain PyTorch."""
    even = padded(key, value, extents, positions)
    return decode_attention_reference(query, *even, query_positions, spec, sink_logits)


def padded(key: Tensor, value: Tensor, extents: Extents, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions as slot_attention takes them: from a head's capacity on 0, and empty."""
    columns = positions.shape[2]
    beyond = torch.arange(columns, device=positions.device) >= extents.capacities[..., None]
    return by_column(key, extents, columns), by_column(value, extents, columns), positions.masked_fill(beyond, -1)


def by_column(x: Tensor, extents: Extents, columns: int) -> Tensor:
    """Rows of all heads, [slots of all heads, ...], as [batch, kv_heads, columns, ...]: from a head's capacity on 0."""
    column = torch.arange(columns, device=x.device)
    beyond = column >= extents.capacities[..., None]
    rows = x[(extents.starts[..., None] + column).clamp(max=len(x) - 1)]
    return rows.masked_fill(beyond.view(*beyond.shape, *[1] * (x.dim() - 1)), 0.0)


def _check(query: Tensor, key: Tensor, value: Tensor, extents: Extents, positions: Tensor) -> None:
    heads = positions.shape[:2]
    if (
        query.shape[0] != heads[0]
        or query.shape[1] % heads[1]
        or key.dim() != 2
        or key.shape[:1] != value.shape[:1]
        or query.shape[-1] != key.shape[-1]
        or any(x.shape != heads or x.dtype != torch.int64 for x in extents)
    ):
        raise ValueError(
            "attention to ragged slots needs query [batch, heads, queries, head_dim], key [slots, head_dim], value "
            "[slots, value_dim], positions [batch, kv_heads, most slots], and starts and capacities [batch, kv_heads] "
            f"int64, with heads a multiple of kv_heads; got query {list(query.shape)}, key {list(key.shape)}, "
            f"value {list(value.shape)}, positions {list(positions.shape)}, starts {list(extents.starts.shape)} and "
            f"capacities {list(extents.capacities.shape)}"
        )


def aot_calls() -> None:
    of_heads = shaped(1, 4, dtype=torch.int64)
    extents, positions = Extents(of_heads, of_heads), shaped(1, 4, 900, dtype=torch.int32)
    for head_dim in AOT_HEAD_DIMS:
        for dtype in AOT_DTYPES:
            key, at = shaped(2000, head_dim, dtype=dtype), shaped(1, 1, dtype=torch.int32)
            query, sinks = shaped(1, 16, 1, head_dim, dtype=dtype), shaped(16, dtype=dtype)
            for spec, bias in ((LogitSpec(0.1), None), (LogitSpec(0.1, 700, 30.0), shaped(2000))):
                ragged_attention(query, key, key, extents, positions, at, spec, bias)
            ragged_decode_attention(query, key, key, extents, positions, at, LogitSpec(0.1))
            ragged_decode_attention(query, key, key, extents, positions, at, LogitSpec(0.1, 700, 30.0), sinks)
            # as many rows as its largest tile has
            query, at = shaped(1, 16, 16, head_dim, dtype=dtype), shaped(1, 16, dtype=torch.int32)
            ragged_attention(query, key, key, extents, positions, at, LogitSpec(0.1))
            ragged_attention(query, key, key, extents, positions, at, LogitSpec(0.1, 700, 30.0), shaped(2000))
