"""Attention in plain PyTorch, in blocks of queries or by torch's fused attention: attention's path on a CPU."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states

# logits that a block may hold: on a CPU 2 MB in float32, about one core's share of the cache; on a GPU, where heads are
# too wide for a kernel, enough to fill it
_BLOCK_LOGITS = 2**19
_BLOCK_LOGITS_ON_GPU = 2**25


def slots_seen(positions: Tensor, query_positions: Tensor, window: int | None, causal: bool = False) -> Tensor:
    """Which slots a query sees, [batch, kv_heads, queries or 1, slots]; one row for all queries where only
    whether a slot is taken matters. causal: no position after the query's own."""
    seen, places = (positions >= 0)[:, :, None, :], query_positions[:, None, :, None]
    if window is not None:
        seen = seen & (positions[:, :, None, :] > places - window)
    return seen & (positions[:, :, None, :] <= places) if causal else seen


def causal_blocks(
    query: Tensor, key: Tensor, spec: LogitSpec, visible: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Masked logits of a causal chunk, a block of queries at a time.

    Yields:
        The block's queries, the tokens they may see, and the logits, -inf where unseen,
        [batch, kv_heads, group, block, tokens of the block] in float32.
    """
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    block = _block(batch * heads, queries, tokens, query.is_cuda, spec.window)
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        first = tokens - queries + start
        low = 0 if spec.window is None else max(0, first - spec.window + 1)
        rows, columns = slice(start, stop), slice(low, first + stop - start)
        logits = query_logits(query[:, :, rows], key[:, :, columns], spec)
        seen = causal_mask(stop - start, columns.stop - low, spec.window, query.device)
        if visible is not None:
            seen = seen & visible[:, None, None, None, columns]
        yield rows, columns, logits.masked_fill_(~seen, -torch.inf)


def slot_blocks(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Masked logits over slots, a block of queries at a time: the queries and
    [batch, kv_heads, group, block, slots] in float32."""
    batch, heads, queries, _ = query.shape
    block = _block(batch * heads, queries, key.shape[2], query.is_cuda)
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        logits = query_logits(query[:, :, rows], key, spec)
        if bias is not None:
            logits += bias[:, :, None, None]
        seen = slots_seen(positions, query_positions[:, rows], spec.window, causal)[:, :, None]
        yield rows, logits.masked_fill_(~seen, -torch.inf)


def causal_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """causal_attention in PyTorch, a block of queries at a time."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, columns, logits in causal_blocks(query, key, spec, visible):
        block_out, block_lse = softmax_values(logits, value[:, :, columns])
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse


def slots_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """slot_attention in PyTorch, a block of queries at a time. causal: as in slots_seen."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    for rows, logits in slot_blocks(query, key, positions, query_positions, spec, causal, bias):
        block_out, block_lse = softmax_values(logits, value)
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse


def cpu_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's fused attention on a CPU, and its log-sum-exp; heads a multiple of kv_heads.

    Args:
        seen: [batch, heads or 1, queries or 1] bool, False for a query that sees nothing. None: all see something.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    lse = lse.float()
    # a query that sees nothing is reported with 0 and 0
    if seen is not None:
        out, lse = out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, -torch.inf)
    unsure = lse == 0
    if bool(unsure.any()):
        # and so is one whose few logits are all NaN: what is not 0 when multiplied by 0 is not finite
        of_keys = (key * 0).sum((2, 3)).repeat_interleave(query.shape[1] // key.shape[1], 1)
        lost = torch.where(unsure, (query * 0).sum(-1) + of_keys[..., None], 0.0)
        out, lse = out + lost[..., None], lse + lost
    return out, lse


def causal_flash(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """causal_attention of a plain spec, by torch's fused attention."""
    queries, tokens = query.shape[2], key.shape[2]
    past = tokens - queries
    bias = None
    if visible is not None:
        bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)[:, None, None, :]
        bias = bias.expand(-1, 1, queries, -1)
    own, earlier = slice(past, None), slice(None, past)

    def attend(tokens: slice, causal: bool, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        of_these = None if bias is None else bias[..., tokens]
        return cpu_flash(query, key[:, :, tokens], value[:, :, tokens], spec.scale, causal, of_these, seen)

    out, lse = attend(own, True, None if visible is None else (visible[:, own].cumsum(-1) > 0)[:, None])
    if past:
        past_out, past_lse = attend(
            earlier, False, None if visible is None else visible[:, earlier].any(-1)[:, None, None]
        )
        out, lse = merge_states([past_out, out], [past_lse, lse])
    return out, lse


def slot_flash(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """slot_attention of a plain spec, by torch's fused attention."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    # the heads of a group become more queries of their kv head: keys are read once per group
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    if bias is None:
        bias = torch.zeros_like(positions, dtype=query.dtype)
    else:
        # 16 bits are too few for a logit
        bias = bias.to(torch.promote_types(query.dtype, bias.dtype))
    mask = bias.masked_fill(positions < 0, -torch.inf)[:, :, None, :]
    seen = (positions >= 0).any(-1)[..., None]
    out, lse = cpu_flash(rows, key, value, scale, False, mask.expand(-1, -1, rows.shape[2], -1), seen)
    return out.reshape(*query.shape[:-1], -1), lse.reshape(batch, heads, queries)


def _block(rows: int, queries: int, tokens: int, on_gpu: bool, window: int | None = None) -> int:
    """Queries of a block, which sees all tokens, or its own and those of a window before them."""
    logits = (_BLOCK_LOGITS_ON_GPU if on_gpu else _BLOCK_LOGITS) // max(1, rows)
    most = logits // max(1, tokens)
    if window is not None:
        # block * (block + window) = logits
        most = max(most, (math.isqrt(window**2 + 4 * logits) - window) // 2)
    return min(queries, max(16, most))


def query_logits(query: Tensor, key: Tensor, spec: LogitSpec) -> Tensor:
    """Logits without a mask, [batch, kv_heads, group, queries, tokens], float32."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    rows = query.float().reshape(batch, kv_heads, -1, head_dim)
    logits = (rows @ key.float().mT).mul_(spec.scale).view(batch, kv_heads, heads // kv_heads, queries, tokens)
    return spec.cap_(logits)


def causal_mask(queries: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens a chunk's last queries see, [queries, tokens] bool."""
    token = torch.arange(tokens, device=device)
    query = torch.arange(tokens - queries, tokens, device=device)[:, None]
    seen = token <= query
    return seen if window is None else seen & (token > query - window)


def softmax_values(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [batch, kv_heads, group, queries, value_dim] of masked logits, and its log-sum-exp."""
    lse = logits.logsumexp(-1)
    # a query that sees nothing: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ value.float()[:, :, None], lse
