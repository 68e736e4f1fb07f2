"""Exact attention that also reports its log-sum-exp, over a causal chunk or over unordered cache slots.

The log-sum-exp is what makes partial attentions mergeable (kernels/merge.py) and lets a second pass
recompute any probability, `exp(logit - lse)`, without a queries x tokens tensor (kernels/column_sums.py).

    logit = scale * q.k        or, with a softcap c,        c * tanh(scale * q.k / c)
    logit += bias              where slots have weights of their own: the log of a slot's weight (arXiv:2602.16284)
    lse = log(sum(exp(logit)))        out = sum(exp(logit - lse) * v)

Flops 4 * batch * heads * (query, key) pairs * head_dim. Bytes: queries and outputs once, keys and values
once per query block (causal) or once (slots, decode).

All log-sum-exps are natural logarithms in float32; a query that sees no key has lse = -inf and out = 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import (
    AOT_DTYPES,
    AOT_HEAD_DIMS,
    AOT_LATENTS,
    attends_in_triton,
    autotune,
    has_wgmma,
    launch,
    op,
    shaped,
    tl,
    triton,
)
from kvcompress.kernels.common.split_attention import FEW_ROWS, launch_split, splits_in_triton
from kvcompress.kernels.common.tile import (
    LOG2E,
    bound_logits,
    dot,
    load_tile,
    rows_aligned,
    store_tile,
    tile_widths,
    wide,
)
from kvcompress.kernels.common.torch_attention import (
    causal_flash,
    causal_in_blocks,
    causal_mask,
    query_logits,
    slot_flash,
    slots_in_blocks,
    slots_seen,
    softmax_values,
)


@op(fake=lambda query, value, **_: _heads_side_by_side(query, value))
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the last tokens of a chunk to the chunk, each to itself and the tokens before it.

    Args:
        query: [batch, heads, queries, head_dim]; query i is token `tokens - queries + i`.
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        visible: [batch, tokens] bool; False marks padding, which no query sees. None: all are visible.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    _check(query, key, value)
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"causal_attention needs at most as many queries as tokens, got {query.shape[2]} and {key.shape[2]}"
        )
    spec = spec.within(key.shape[2])
    if splits_in_triton(query, key, value) and query.numel():
        run = _launch_causal
    elif query.is_cuda or not spec.is_plain or key.shape[-1] != value.shape[-1]:
        run = causal_in_blocks
    else:
        run = causal_flash
    out, lse = run(query, key, value, spec, visible)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def causal_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What causal_attention means, in plain PyTorch."""
    logits = query_logits(query, key, spec)
    seen = causal_mask(query.shape[2], key.shape[2], spec.window, query.device)
    if visible is not None:
        seen = seen & visible[:, None, None, None, :]
    return _softmax_reference(logits.masked_fill(~seen, -torch.inf), value, query)


@op(
    fake=lambda query, value, **_: (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )
)
def slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to cached tokens that lie in slots of any order, some of them empty.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, slots, head_dim].
        value: [batch, kv_heads, slots, value_dim].
        positions: [batch, kv_heads, slots] int32, the position of each slot's token, at most that of every
            query; -1 marks an empty slot.
        query_positions: [batch, queries] int32; read only where there is a window.
        bias: [batch, kv_heads, slots] float32, finite: the natural logarithm of each slot's weight, which is added to
            its logits after scale and softcap, and which the log-sum-exp counts. None: every slot weighs 1.

    Returns:
        The output, [batch, heads, queries, value_dim] in query's dtype, and its log-sum-exp,
        [batch, heads, queries].
    """
    _check(query, key, value)
    if bias is not None and bias.shape != key.shape[:3]:
        raise ValueError(
            f"slot_attention needs a bias for every slot, {list(key.shape[:3])}, got {list(bias.shape)}: expand it"
        )
    if not key.shape[2]:
        # torch's fused attention divides by how many there are
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return out, query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    if splits_in_triton(query, key, value) and query.numel():
        return launch_split(query, key, value, spec, None, positions, query_positions, bias)
    if query.is_cuda or not spec.is_plain or key.shape[-1] != value.shape[-1]:
        return slots_in_blocks(query, key, value, positions, query_positions, spec, bias=bias)
    return slot_flash(query, key, value, positions, spec.scale, bias)


def slot_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    spec: LogitSpec,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What slot_attention means, in plain PyTorch."""
    logits = query_logits(query, key, spec)
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    seen = slots_seen(positions, query_positions, spec.window)[:, :, None]
    return _softmax_reference(logits.masked_fill(~seen, -torch.inf), value, query)


def _heads_side_by_side(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Empty results of causal_attention, in the layout of torch's fused attention and of the code that follows it."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if (
        query.shape[0] != key.shape[0]
        or query.shape[-1] != key.shape[-1]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "attention needs query [batch, heads, queries, head_dim], key [batch, kv_heads, tokens, head_dim] and "
            "value [batch, kv_heads, tokens, value_dim] with heads a multiple of kv_heads; got "
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        )


def _softmax_reference(logits: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = softmax_values(logits, value)
    return out.reshape(*query.shape[:-1], -1).to(query.dtype), lse.reshape(query.shape[:-1])


def _launch_causal(
    query: Tensor, key: Tensor, value: Tensor, spec: LogitSpec, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    if spec.window is not None:
        # no query sees further back than this
        reach = min(key.shape[2], spec.window + queries - 1)
        key, value = key[:, :, -reach:], value[:, :, -reach:]
        visible = None if visible is None else visible[:, -reach:]
    kv_heads, tokens, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    if queries * (heads // kv_heads) <= FEW_ROWS or not attends_in_triton(query):
        return launch_split(query, key, value, spec, visible)
    if spec.scale <= 0:
        # the kernel takes the maximum before it scales
        query, spec = query * spec.scale, spec._replace(scale=1.0)
    out, lse = _heads_side_by_side(query, value)
    query, key, value = rows_aligned(query), rows_aligned(key), rows_aligned(value)
    visible = None if visible is None else visible.contiguous().view(torch.uint8)
    (dim, tail), (value_width, value_tail) = tile_widths(query.shape[-1]), tile_widths(value.shape[-1])

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(queries, meta["BLOCK_QUERIES"]), heads, batch

    launch(
        _causal_kernel, grid, query, key, value, visible, out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        heads, queries, tokens, *spec.arguments, int(queries > _LONG),
        GROUP=heads // kv_heads, HEAD_DIM=query.shape[-1], DIM=dim, TAIL=tail,
        VALUE_DIM=value_dim, VALUE_ROOM=value.shape[-1], VALUE_WIDTH=value_width, VALUE_TAIL=value_tail,
        PADDED=visible is not None, **spec.constants,
    )  # fmt: skip
    return out, lse


# from this many queries on, the causal kernel is tuned separately
_LONG = 512


class _Config(NamedTuple):
    queries: int
    tokens: int
    warps: int
    stages: int
    needs_wgmma: bool = False
    only_plain: bool = False  # spills with padding, a window and a softcap

    def triton(self) -> triton.Config:
        blocks = {"BLOCK_QUERIES": self.queries, "BLOCK_TOKENS": self.tokens}
        return triton.Config(blocks, num_warps=self.warps, num_stages=self.stages)


# by element size, then by the largest head_dim: the largest tiles that never spill (evals/bench/aot.py), and a smaller
_CAUSAL_CONFIGS = {
    2: {
        64: [_Config(64, 32, 4, 3), _Config(128, 64, 8, 3), _Config(64, 64, 4, 3, needs_wgmma=True)],
        128: [
            _Config(64, 32, 8, 3),
            _Config(128, 32, 8, 2),
            _Config(128, 64, 8, 3, needs_wgmma=True),
            _Config(64, 64, 4, 3, needs_wgmma=True, only_plain=True),
        ],
        256: [_Config(64, 16, 8, 2), _Config(128, 32, 8, 2, needs_wgmma=True)],
    },
    4: {
        64: [_Config(32, 16, 4, 2)],
        128: [_Config(32, 16, 8, 2), _Config(16, 16, 4, 2)],
        256: [_Config(16, 16, 8, 2)],
    },
}


def _causal_configs(width: int, element_size: int) -> list[_Config]:
    return next(configs for widest, configs in _CAUSAL_CONFIGS[element_size].items() if width <= widest)


def _prune_causal(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    width = max(constants["DIM"] + constants["TAIL"], constants["VALUE_WIDTH"] + constants["VALUE_TAIL"])
    query = arguments["query_ptr"]
    plain = not any(constants[name] for name in ("PADDED", "WINDOWED", "SOFTCAPPED"))
    return [
        config.triton()
        for config in _causal_configs(width, query.element_size())
        if (has_wgmma(query.device) or not config.needs_wgmma) and (plain or not config.only_plain)
    ]


@autotune(
    [config.triton() for sizes in _CAUSAL_CONFIGS.values() for configs in sizes.values() for config in configs],
    key=["long", "HEAD_DIM", "VALUE_DIM", "PADDED", "WINDOWED", "SOFTCAPPED"],
    prune=_prune_causal,
)
@triton.jit(do_not_specialize=["queries", "tokens", "window", "long"])
def _causal_kernel(
    query_ptr, key_ptr, value_ptr, visible_ptr, out_ptr, lse_ptr,
    query_batch_stride, query_head_stride, query_stride,
    key_batch_stride, key_head_stride, key_stride,
    value_batch_stride, value_head_stride, value_stride,
    heads, queries, tokens, window, scale, softcap,
    long,  # only a key of the autotuner: whether there are many queries
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,  # VALUE_DIM with the padding of the values
    VALUE_WIDTH: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_QUERIES queries of one head; the last queries see most, so they start first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key_ptr += batch * key_batch_stride + (head // GROUP) * key_head_stride
    value_ptr += batch * value_batch_stride + (head // GROUP) * value_head_stride

    row = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)  # [Q]
    row_ok = row < queries
    query_offset = batch * query_batch_stride + head * query_head_stride + row.to(tl.int64) * query_stride
    query = load_tile(query_ptr, query_offset, row_ok, 0, DIM, HEAD_DIM)  # [Q, DIM]
    if TAIL:
        query_tail = load_tile(query_ptr, query_offset, row_ok, DIM, TAIL, HEAD_DIM)
    position = tokens - queries + row  # [Q]
    first = tokens - queries + block * BLOCK_QUERIES
    last = tl.minimum(first + BLOCK_QUERIES, tokens) - 1

    # keys full_low .. full_high are seen by every query of the block and need no mask
    full_high = (first + 1) // BLOCK_TOKENS * BLOCK_TOKENS
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS
        full_low = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_TOKENS) * BLOCK_TOKENS
    else:
        low = 0
        full_low = 0

    # base 2 inside: exp2 is one instruction, and a factor that is applied only there costs none
    to_base_2 = LOG2E if SOFTCAPPED else scale * LOG2E
    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, VALUE_WIDTH], tl.float32)
    out_tail = tl.zeros([BLOCK_QUERIES, VALUE_TAIL if VALUE_TAIL else 1], tl.float32)
    column = tl.arange(0, BLOCK_TOKENS)  # [T]

    # the keys at the edge of the window, those all queries see, and those at the diagonal
    for part in tl.static_range(0 if WINDOWED else 1, 3):
        if part == 0:
            start_token = low
            stop_token = tl.minimum(full_low, last + 1)
        elif part == 1:
            start_token = full_low
            stop_token = full_high
        else:
            start_token = tl.maximum(full_low, full_high)
            stop_token = last + 1
        for start in range(start_token, stop_token, BLOCK_TOKENS):
            token = start + column
            token_ok = token < tokens
            key_offset = column * key_stride
            tile_ptr = key_ptr + wide(start) * key_stride
            key = load_tile(tile_ptr, key_offset, token_ok, 0, DIM, HEAD_DIM)  # [T, DIM]
            logits = dot(query, tl.trans(key), tl.zeros([BLOCK_QUERIES, BLOCK_TOKENS], tl.float32))  # [Q, T]
            if TAIL:
                key_tail = load_tile(tile_ptr, key_offset, token_ok, DIM, TAIL, HEAD_DIM)
                logits = dot(query_tail, tl.trans(key_tail), logits)
            if SOFTCAPPED:
                logits = bound_logits(logits, scale, softcap, SOFTCAPPED)
            if part != 1:
                seen = (token[None, :] <= position[:, None]) & token_ok[None, :]
                if WINDOWED:
                    seen = seen & (token[None, :] > position[:, None] - window)
                logits = tl.where(seen, logits, float("-inf"))
            if PADDED:
                visible = tl.load(visible_ptr + batch * tokens + token, mask=token_ok, other=0)
                logits = tl.where((visible != 0)[None, :], logits, float("-inf"))

            risen = tl.maximum(peak, tl.max(logits, 1) * to_base_2)
            # a query that has seen nothing yet: shifting by 0 makes exp(-inf - shift) 0 instead of NaN
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(logits * to_base_2 - shift[:, None])  # [Q, T]
            peak = risen
            total = total * fade + tl.sum(weight, 1)
            value_offset = column * value_stride
            tile_ptr = value_ptr + wide(start) * value_stride
            value = load_tile(tile_ptr, value_offset, token_ok, 0, VALUE_WIDTH, VALUE_ROOM)  # [T, VALUE_WIDTH]
            weight = weight.to(value.dtype)
            out = dot(weight, value, out * fade[:, None])
            if VALUE_TAIL:
                value_tail = load_tile(tile_ptr, value_offset, token_ok, VALUE_WIDTH, VALUE_TAIL, VALUE_ROOM)
                out_tail = dot(weight, value_tail, out_tail * fade[:, None])

    out_offset = ((batch * queries + row) * heads + head) * VALUE_DIM
    lse_offset = (batch * heads + head) * queries + row
    norm = tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    store_tile(out_ptr, out_offset, out * norm, row_ok, 0, VALUE_WIDTH, VALUE_DIM)
    if VALUE_TAIL:
        store_tile(out_ptr, out_offset, out_tail * norm, row_ok, VALUE_WIDTH, VALUE_TAIL, VALUE_DIM)
    tl.store(lse_ptr + lse_offset, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)


def aot_calls() -> None:
    for head_dim in AOT_HEAD_DIMS:
        for dtype in AOT_DTYPES:
            visible, positions = shaped(1, 900, dtype=torch.bool), shaped(1, 4, 900, dtype=torch.int32)
            key = shaped(1, 4, 900, head_dim, dtype=dtype)
            plain, bounded = LogitSpec(0.1), LogitSpec(0.1, window=700, softcap=30.0)
            # as many rows as a tile of the split kernel has, as its largest has, and enough for causal tiles
            for queries in (1, 16, 128):
                query = shaped(1, 16, queries, head_dim, dtype=dtype)
                causal_attention(query, key, key, plain)
                causal_attention(query, key, key, bounded, visible)
                if queries > 16:
                    continue
                at = shaped(1, queries, dtype=torch.int32)
                slot_attention(query, key, key, positions, at, plain)
                slot_attention(query, key, key, positions, at, bounded)
                slot_attention(query, key, key, positions, at, plain, shaped(1, 4, 900))
                slot_attention(query, key, key, positions, at, bounded, shaped(1, 4, 900))
    for rank, shared in AOT_LATENTS:
        latents, visible = shaped(1, 1, 900, rank + shared, dtype=torch.bfloat16), shaped(1, 900, dtype=torch.bool)
        positions, at = shaped(1, 1, 900, dtype=torch.int32), shaped(1, 4, dtype=torch.int32)
        query = shaped(1, 64, 4, rank + shared, dtype=torch.bfloat16)
        causal_attention(query, latents, latents[..., :rank], LogitSpec(0.1))
        causal_attention(query, latents, latents[..., :rank], LogitSpec(0.1), visible)
        slot_attention(query, latents, latents[..., :rank], positions, at, LogitSpec(0.1))
