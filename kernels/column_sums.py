"""Column sums and maxima of the attention matrix: how much attention each token received.

    sums[j] = sum over queries i, and over the query heads of j's group, of exp(logit[i, j] - lse[i])
    maxima[j] = the largest of them

Sums are what H2O (arXiv:2306.14048) asks for, maxima what KVzip (arXiv:2505.23416) does.

The log-sum-exp comes from the attention pass, so probabilities are recomputed a tile at a time and the
queries x tokens matrix never exists. Flops 2 * batch * heads * (query, key) pairs * head_dim, half of
attention's; bytes (heads + kv_heads) * head_dim per token, and the lse.
"""

from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.common.column_tiles import causal_tiles, slot_tiles
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import (
    AOT_DTYPES,
    AOT_HEAD_DIMS,
    attends_in_triton,
    autotune,
    launch,
    op,
    shaped,
    tl,
    triton,
)
from kvcompress.kernels.common.tile import (
    LOG2E,
    MIN_SIDE,
    bound_logits,
    dot,
    load_tile,
    rows_aligned,
    tile_widths,
    wide,
)
from kvcompress.kernels.common.torch_attention import causal_mask, query_logits, slots_seen


@op(fake=lambda key, **_: key.new_empty(key.shape[:3], dtype=torch.float32))
def causal_column_sums(
    query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec, visible: Tensor | None = None
) -> Tensor:
    """Attention received by each token of a chunk from the chunk's last queries.

    Args:
        query: [batch, heads, queries, head_dim]; query i is token `tokens - queries + i`.
        key: [batch, kv_heads, tokens, head_dim].
        lse: [batch, heads, queries] float32, over all keys that the query saw, here or elsewhere.
            A query with lse of +inf or -inf is left out; one with NaN gives NaN to all it sees.
        visible: as in causal_attention.

    Returns:
        [batch, kv_heads, tokens] float32; 0 for a token nobody sees.
    """
    spec = spec.within(key.shape[2])
    if attends_in_triton(query) and query.numel():
        return _launch(query, key, lse, spec, visible)
    return causal_tiles(query, key, lse, spec, visible)


def causal_column_sums_reference(
    query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec, visible: Tensor | None = None
) -> Tensor:
    """What causal_column_sums means, in plain PyTorch."""
    seen = causal_mask(query.shape[2], key.shape[2], spec.window, key.device)
    if visible is not None:
        seen = seen & visible[:, None, None, None, :]
    return _probabilities(query, key, lse, spec, seen).sum((2, 3))


@op(fake=lambda key, **_: key.new_empty(key.shape[:3], dtype=torch.float32))
def slot_column_sums(
    query: Tensor, key: Tensor, positions: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """Attention received by each cache slot from the queries.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        positions, query_positions: as in slot_attention.
        lse: [batch, heads, queries] float32, over all keys that the query saw, here or elsewhere.
            A query with lse of +inf or -inf is left out; one with NaN gives NaN to all it sees.

    Returns:
        [batch, kv_heads, slots] float32; 0 for an empty slot.
    """
    return _slot_columns(query, key, positions, query_positions, lse, spec, takes_max=False)


@op(fake=lambda key, **_: key.new_empty(key.shape[:3], dtype=torch.float32))
def slot_column_maxima(
    query: Tensor, key: Tensor, positions: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """The most attention that each cache slot received from any one query and head of its group.

    Args:
        query, key, positions, query_positions, lse: as in slot_column_sums.

    Returns:
        [batch, kv_heads, slots] float32; 0 for an empty slot.
    """
    return _slot_columns(query, key, positions, query_positions, lse, spec, takes_max=True)


def slot_column_sums_reference(
    query: Tensor, key: Tensor, positions: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """What slot_column_sums means, in plain PyTorch."""
    return _slot_probabilities(query, key, positions, query_positions, lse, spec).sum((2, 3))


def slot_column_maxima_reference(
    query: Tensor, key: Tensor, positions: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """What slot_column_maxima means, in plain PyTorch."""
    return _slot_probabilities(query, key, positions, query_positions, lse, spec).amax((2, 3))


def _slot_probabilities(
    query: Tensor, key: Tensor, positions: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
) -> Tensor:
    """[batch, kv_heads, group, queries, slots]."""
    return _probabilities(query, key, lse, spec, slots_seen(positions, query_positions, spec.window)[:, :, None])


def _probabilities(query: Tensor, key: Tensor, lse: Tensor, spec: LogitSpec, seen: Tensor) -> Tensor:
    """exp(logit - lse) where a query sees a token and is not left out, [batch, kv_heads, group, queries, tokens]."""
    lse = lse.unflatten(1, (key.shape[1], -1))[..., None]
    return torch.where(seen & ~lse.isinf(), (query_logits(query, key, spec) - lse).exp(), 0.0)


def _slot_columns(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    lse: Tensor,
    spec: LogitSpec,
    takes_max: bool,
) -> Tensor:
    if attends_in_triton(query) and query.numel():
        return _launch(query, key, lse, spec, None, positions, query_positions, takes_max)
    return slot_tiles(query, key, positions, query_positions, lse, spec, takes_max)


def _launch(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    spec: LogitSpec,
    visible: Tensor | None,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    takes_max: bool = False,
) -> Tensor:
    """positions and query_positions as in slot_column_sums; None: a causal chunk, as in causal_column_sums."""
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    query, key = rows_aligned(query), rows_aligned(key)
    group = heads // kv_heads
    inner = _heads_at_once(group)
    # in the order of the rows, and in base 2: both once here instead of for each block of tokens
    by_row = lse.detach().reshape(batch, -1, inner, queries).mT
    lse = torch.mul(by_row, LOG2E.value, out=lse.new_empty(by_row.shape))
    visible = None if visible is None else visible.contiguous().view(torch.uint8)
    positions = None if positions is None else positions.contiguous()
    query_positions = None if spec.window is None or query_positions is None else query_positions.contiguous()
    sums = key.new_empty(batch, kv_heads, tokens, dtype=torch.float32)
    head_dim = query.shape[-1]
    dim, tail = tile_widths(head_dim)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(tokens, meta["BLOCK_TOKENS"]), kv_heads, batch

    if tokens:
        launch(
            _column_sums_kernel, grid, query, key, lse, visible, positions, query_positions, sums,
            *query.stride()[:3], *key.stride()[:3],
            kv_heads, queries, tokens, *spec.arguments, int(queries > _LONG),
            GROUP=group, INNER=inner, HEAD_DIM=head_dim, DIM=dim, TAIL=tail,
            PADDED=visible is not None, SLOTTED=positions is not None, TAKES_MAX=takes_max, **spec.constants,
        )  # fmt: skip
    return sums


def _heads_at_once(group: int) -> int:
    """How many of a group's heads one tile mixes: a power of two, so that no tile ends within a query."""
    return min(group & -group, MIN_SIDE)


# from this many queries on, the kernel is tuned separately
_LONG = 512


def _config(tokens: int, rows: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_ROWS": rows}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# by element size, then by the largest head_dim
_CONFIGS = {
    2: {
        64: [_config(64, 64, 4, 3), _config(64, 128, 4, 2)],
        128: [_config(64, 64, 4, 3), _config(64, 128, 4, 2), _config(128, 64, 8, 3)],
        256: [_config(64, 64, 8, 2)],
    },
    4: {
        64: [_config(32, 32, 4, 2)],
        128: [_config(32, 32, 8, 2)],
        256: [_config(16, 16, 4, 2)],
    },
}


def _configs(width: int, element_size: int) -> list[triton.Config]:
    return next(configs for widest, configs in _CONFIGS[element_size].items() if width <= widest)


def _prune(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    return _configs(constants["DIM"] + constants["TAIL"], arguments["query_ptr"].element_size())


@autotune(
    [config for sizes in _CONFIGS.values() for configs in sizes.values() for config in configs],
    key=["long", "HEAD_DIM", "SLOTTED", "WINDOWED"],
    prune=_prune,
)
@triton.jit(do_not_specialize=["queries", "tokens", "window", "long"])
def _column_sums_kernel(
    query_ptr, key_ptr, lse_ptr, visible_ptr, positions_ptr, query_positions_ptr, sums_ptr,
    query_batch_stride, query_head_stride, query_stride,
    key_batch_stride, key_head_stride, key_stride,
    kv_heads, queries, tokens, window, scale, softcap,
    long,  # only a key of the autotuner: whether there are many queries
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TAIL: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTTED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    TAKES_MAX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_TOKENS tokens of one KV head and runs over all rows that see them, in order, so that
    # the sums are deterministic; a row is one (query, head of INNER heads);
    # lse is in base 2, [batch, kv_heads, GROUP / INNER, queries, INNER]
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_token = tl.program_id(0) * BLOCK_TOKENS
    token = first_token + tl.arange(0, BLOCK_TOKENS)  # [T]
    token_ok = token < tokens
    last_token = tl.minimum(first_token + BLOCK_TOKENS, tokens) - 1
    query_ptr += batch * query_batch_stride + kv_head * GROUP * query_head_stride
    lse_ptr += (batch * kv_heads + kv_head) * GROUP * queries

    key_offset = batch * key_batch_stride + kv_head * key_head_stride + token.to(tl.int64) * key_stride
    key = load_tile(key_ptr, key_offset, token_ok, 0, DIM, HEAD_DIM)  # [T, DIM]
    if TAIL:
        key_tail = load_tile(key_ptr, key_offset, token_ok, DIM, TAIL, HEAD_DIM)
    sums_offset = (batch * kv_heads + kv_head) * tokens + token
    if SLOTTED:
        token_position = tl.load(positions_ptr + sums_offset, mask=token_ok, other=-1)  # [T]
    else:
        token_position = token

    # queries start .. full_start are at the diagonal, full_start .. full_stop see all of these tokens and need no
    # mask, full_stop .. stop are at the edge of the window
    past = tokens - queries
    step: tl.constexpr = BLOCK_ROWS // INNER
    start = 0
    full_start = 0
    full_stop = queries
    stop = queries
    if SLOTTED:
        if WINDOWED:
            full_stop = 0
    else:
        start = tl.maximum(first_token - past, 0)
        full_start = start + tl.cdiv(tl.maximum(last_token - past, 0) - start, step) * step
        full_stop = tl.maximum(full_stop, full_start)
        if WINDOWED:
            stop = tl.minimum(last_token - past + window, queries)
            within = tl.maximum(first_token - past + window, 0)
            full_stop = full_start + tl.maximum(tl.minimum(within, stop) - full_start, 0) // step * step

    row = tl.arange(0, BLOCK_ROWS)  # [R]
    query_offset = (row % INNER).to(tl.int64) * query_head_stride + (row // INNER).to(tl.int64) * query_stride
    if not SOFTCAPPED:
        # to base 2 along with the lse: one multiplication and one addition per logit
        scale *= LOG2E
    sums = tl.zeros([BLOCK_TOKENS], tl.float32)
    for _ in range(GROUP // INNER):
        # without a window, all slots are of the second kind
        for part in tl.static_range(1 if SLOTTED and not WINDOWED else 0, 2 if SLOTTED and not WINDOWED else 3):
            if part == 0:
                from_query = start
                to_query = full_start
            elif part == 1:
                from_query = full_start
                to_query = full_stop
            else:
                from_query = full_stop
                to_query = stop
            for first in range(from_query, to_query, step):
                index = first + row // INNER
                row_ok = index < queries
                tile_ptr = query_ptr + wide(first) * query_stride
                query = load_tile(tile_ptr, query_offset, row_ok, 0, DIM, HEAD_DIM)  # [R, DIM]
                logits = dot(key, tl.trans(query), tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32))  # [T, R]
                if TAIL:
                    query_tail = load_tile(tile_ptr, query_offset, row_ok, DIM, TAIL, HEAD_DIM)
                    logits = dot(key_tail, tl.trans(query_tail), logits)
                lse = tl.load(lse_ptr + wide(first) * INNER + row, mask=row_ok, other=float("inf"))
                # rows that are absent, left out, or saw nothing count as exp2(-inf) = 0
                lse = tl.where(lse == float("-inf"), float("inf"), lse)
                logits = bound_logits(logits, scale, softcap, SOFTCAPPED)
                if SOFTCAPPED:
                    logits *= LOG2E
                probability = tl.exp2(logits - lse[None, :])
                if part != 1:
                    if SLOTTED:
                        position = tl.load(query_positions_ptr + batch * queries + index, mask=row_ok, other=0)
                        seen = token_position[:, None] > position[None, :] - window
                    else:
                        position = past + index
                        seen = token_position[:, None] <= position[None, :]
                        if WINDOWED:
                            seen = seen & (token_position[:, None] > position[None, :] - window)
                    probability = tl.where(seen, probability, 0.0)
                if TAKES_MAX:
                    # tl.max ignores NaN
                    unknown = tl.sum(tl.where(probability == probability, 0.0, probability), 1)
                    sums = tl.maximum(sums, tl.max(probability, 1) + unknown, tl.PropagateNan.ALL)
                else:
                    sums += tl.sum(probability, 1)

        query_ptr += INNER * query_head_stride
        lse_ptr += INNER * queries

    if SLOTTED:
        sums = tl.where(token_position >= 0, sums, 0.0)
    if PADDED:
        visible = tl.load(visible_ptr + batch * tokens + token, mask=token_ok, other=0)
        sums = tl.where(visible != 0, sums, 0.0)
    tl.store(sums_ptr + sums_offset, sums, mask=token_ok)


def aot_calls() -> None:
    for head_dim in AOT_HEAD_DIMS:
        for dtype in AOT_DTYPES:
            query, key = (shaped(2, heads, 128, head_dim, dtype=dtype) for heads in (32, 8))
            positions, at = shaped(2, 8, 128, dtype=torch.int32), shaped(2, 128, dtype=torch.int32)
            lse, visible = shaped(2, 32, 128), shaped(2, 128, dtype=torch.bool)
            plain, bounded = LogitSpec(0.1), LogitSpec(0.1, window=64, softcap=30.0)
            causal_column_sums(query, key, lse, plain)
            causal_column_sums(query, key, lse, bounded, visible)
            slot_column_sums(query, key, positions, at, lse, plain)
            slot_column_sums(query, key, positions, at, lse, bounded)
            slot_column_maxima(query, key, positions, at, lse, plain)
