"""How relevant chunks of the cache are to queries, by their landmarks (ShadowKV, arXiv:2410.21465, algorithm 2).

    probability[query, head, c] = softmax over the open chunks c of logit(query, landmark[c])
    score[kv_head, c] = max over the heads of the group of ( sum over queries of probability )

A chunk that is not open (an outlier, which is read anyway, or a place without a chunk) takes no part and scores -inf.
Logits are those of attention: scaled, and bounded where attention bounds them.

Bytes: the landmarks once for one query, batch * kv_heads * chunks * head_dim * element size, plus 8 bytes per chunk and
query head for their logits; twice for several queries, whose logits are not kept. Flops 2 * batch * heads * queries *
chunks * head_dim, twice for several queries: bound by bandwidth, 1 / (2 * chunk) of what dense decoding reads.
"""

from typing import Literal

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, launch, op, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.split_attention import split_keys
from kvcompress.kernels.common.tile import (
    LOG2E,
    MIN_SIDE,
    bound_logits,
    dot,
    load_tile,
    rows_aligned,
    tile_width,
    wide,
)
from kvcompress.kernels.common.torch_attention import query_logits

Group = Literal["max", "mean", "sum"]


@op(fake=lambda landmarks, **_: landmarks.new_empty(landmarks.shape[:3], dtype=torch.float32))
def chunk_scores(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    spec: LogitSpec,
    visible: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """Scores of chunks for a block of queries that will read the same chunks.

    Args:
        query: [batch, heads, queries, head_dim].
        landmarks: [batch, kv_heads, chunks, head_dim].
        is_open: [batch, kv_heads, chunks] bool.
        visible: [batch, queries] bool, False for queries that are padding. None: all count.
        spec: as in the attention itself, but without a window, because a landmark has no position.
        group: how the query heads of a KV head agree.

    Returns:
        [batch, kv_heads, chunks] float32, -inf for chunks that are not open.

    Raises:
        ValueError: shapes that do not fit together, or a window.
    """
    if (
        query.shape[0] != landmarks.shape[0]
        or query.shape[-1] != landmarks.shape[-1]
        or is_open.shape != landmarks.shape[:-1]
        or query.shape[1] % landmarks.shape[1]
    ):
        raise ValueError(
            "chunk_scores needs query [batch, heads, queries, head_dim], landmarks [batch, kv_heads, chunks, head_dim] "
            "and is_open [batch, kv_heads, chunks] with heads a multiple of kv_heads; got "
            f"{list(query.shape)}, {list(landmarks.shape)} and {list(is_open.shape)}"
        )
    if spec.window is not None:
        raise ValueError(
            f"chunk_scores takes no window, because a landmark has no position; got window = {spec.window}"
        )
    run = _launch if runs_triton(query) and query.numel() and is_open.numel() else chunk_scores_reference
    return run(query, landmarks, is_open, spec, visible, group)


def chunk_scores_reference(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    spec: LogitSpec,
    visible: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """What chunk_scores means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    logits = query_logits(query, landmarks, spec)
    # a finite floor: where nothing is open, the softmax is flat instead of NaN, and the mask below clears it
    shares = logits.masked_fill_(~is_open[:, :, None, None], -1e30).softmax(-1)
    if visible is not None:
        shares = shares.masked_fill(~visible[:, None, None, :, None], 0.0)
    shares = shares.sum(3)
    scores = shares.amax(2) if group == "max" else shares.mean(2) if group == "mean" else shares.sum(2)
    return scores.masked_fill(~is_open, -torch.inf)


def _launch(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    spec: LogitSpec,
    visible: Tensor | None,
    group: Group,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    kv_heads, chunks = landmarks.shape[1:3]
    query, landmarks = rows_aligned(query), rows_aligned(landmarks)
    is_open = is_open.contiguous().view(torch.uint8)
    visible = None if visible is None else visible.contiguous().view(torch.uint8)
    row_blocks = triton.cdiv(queries * heads // kv_heads, _ROWS)
    block = _block(query.shape[-1], query.element_size())
    splits, split_chunks = split_keys(batch * kv_heads * row_blocks, chunks, block, query.device)
    lses = query.new_empty(splits, batch, heads, queries, dtype=torch.float32)
    logits = query.new_empty(batch, heads, chunks, dtype=torch.float32) if queries == 1 else None
    scores = query.new_empty(batch, kv_heads, chunks, dtype=torch.float32)
    shared = {
        "GROUP": heads // kv_heads,
        "HEAD_DIM": query.shape[-1],
        "DIM": tile_width(query.shape[-1]),
        "SOFTCAPPED": spec.softcap is not None,
        "ONE_QUERY": queries == 1,
        "BLOCK_ROWS": _ROWS,
        "BLOCK_CHUNKS": block,
    }
    strides = (*query.stride()[:3], *landmarks.stride()[:3])
    launch(
        _landmark_lse_kernel, (splits * row_blocks, kv_heads, batch),
        query, landmarks, is_open, lses, logits, *strides,
        queries, chunks, splits, split_chunks, *spec.arguments[1:], num_stages=_PREFETCHING, **shared,
    )  # fmt: skip
    launch(
        _chunk_scores_kernel, (triton.cdiv(chunks, block), kv_heads, batch),
        query, landmarks, is_open, visible, lses.logsumexp(0), logits, scores, *strides,
        queries, chunks, *spec.arguments[1:],
        PADDED=visible is not None, TAKES_MAX=group == "max", FACTOR=kv_heads / heads if group == "mean" else 1.0,
        num_stages=_STAGES, **shared,
    )  # fmt: skip
    return scores


# rows (query heads times queries) of a tile
_ROWS = MIN_SIDE
# the first kernel reads all landmarks, three tiles ahead; the loop of the second is over queries, which are few
_PREFETCHING, _STAGES = 4, 2


def _block(head_dim: int, element_size: int) -> int:
    """Landmarks of a tile, 16 KiB of them."""
    return max(MIN_SIDE, min(64, 2**14 // (tile_width(head_dim) * element_size)))


@triton.jit(do_not_specialize=["queries", "chunks", "splits", "split_chunks"])
def _landmark_lse_kernel(
    query_ptr, landmarks_ptr, open_ptr, lses_ptr, logits_ptr,
    query_batch_stride, query_head_stride, query_stride,
    landmark_batch_stride, landmark_head_stride, landmark_stride,
    queries, chunks, splits, split_chunks, scale, softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    # one program owns some rows of one KV head and one split of the chunks
    batch = wide(tl.program_id(2))
    kv_heads = tl.num_programs(1)
    kv_head = wide(tl.program_id(1))
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    row_ok = row < queries * GROUP
    head = kv_head * GROUP + row % GROUP
    index = (row // GROUP).to(tl.int64)
    query_offset = batch * query_batch_stride + head * query_head_stride + index * query_stride
    query = load_tile(query_ptr, query_offset, row_ok, 0, DIM, HEAD_DIM)  # [R, DIM]
    landmarks_ptr += batch * landmark_batch_stride + kv_head * landmark_head_stride
    open_ptr += (batch * kv_heads + kv_head) * chunks

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(split * split_chunks, tl.minimum((split + 1) * split_chunks, chunks), BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)  # [C]
        chunk_ok = chunk < chunks
        landmark = load_tile(landmarks_ptr, wide(chunk) * landmark_stride, chunk_ok, 0, DIM, HEAD_DIM)  # [C, DIM]
        is_open = tl.load(open_ptr + chunk, mask=chunk_ok, other=0) != 0
        logits = dot(query, tl.trans(landmark), tl.zeros([BLOCK_ROWS, BLOCK_CHUNKS], tl.float32))  # [R, C]
        logits = tl.where(is_open[None, :], bound_logits(logits, scale, softcap, SOFTCAPPED), float("-inf"))
        if ONE_QUERY:
            # a row is a head
            offset = (batch * kv_heads * GROUP + head) * chunks
            tl.store(logits_ptr + offset[:, None] + chunk[None, :], logits, mask=row_ok[:, None] & chunk_ok[None, :])
        logits *= LOG2E
        risen = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = risen
    out = ((split * tl.num_programs(2) + batch) * kv_heads * GROUP + head) * queries + index
    tl.store(lses_ptr + out, tl.where(total == 0, float("-inf"), peak / LOG2E + tl.log(total)), mask=row_ok)


@triton.jit(do_not_specialize=["queries", "chunks"])
def _chunk_scores_kernel(
    query_ptr, landmarks_ptr, open_ptr, visible_ptr, lse_ptr, logits_ptr, scores_ptr,
    query_batch_stride, query_head_stride, query_stride,
    landmark_batch_stride, landmark_head_stride, landmark_stride,
    queries, chunks, scale, softcap,
    PADDED: tl.constexpr,
    TAKES_MAX: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    # one program owns some chunks of one KV head
    batch = wide(tl.program_id(2))
    kv_heads = tl.num_programs(1)
    kv_head = wide(tl.program_id(1))
    chunk = tl.program_id(0) * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)  # [C]
    chunk_ok = chunk < chunks
    owner = (batch * kv_heads + kv_head) * chunks
    is_open = tl.load(open_ptr + owner + chunk, mask=chunk_ok, other=0) != 0
    if not ONE_QUERY:
        landmarks_ptr += batch * landmark_batch_stride + kv_head * landmark_head_stride
        landmark = load_tile(landmarks_ptr, wide(chunk) * landmark_stride, chunk_ok, 0, DIM, HEAD_DIM)  # [C, DIM]

    scores = tl.zeros([BLOCK_CHUNKS], tl.float32)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        first = (batch * kv_heads * GROUP + head) * queries
        share = tl.zeros([BLOCK_CHUNKS], tl.float32)
        if ONE_QUERY:
            lse = tl.load(lse_ptr + first)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            logits = tl.load(logits_ptr + first * chunks + chunk, mask=chunk_ok, other=float("-inf"))
            share = tl.exp(logits - lse)
            if PADDED:
                share = tl.where(tl.load(visible_ptr + batch) != 0, share, 0.0)
        else:
            for start in range(0, queries, BLOCK_ROWS):
                row = start + tl.arange(0, BLOCK_ROWS)  # [R]
                counts = row < queries
                if PADDED:
                    counts = counts & (tl.load(visible_ptr + batch * queries + row, mask=counts, other=0) != 0)
                offset = batch * query_batch_stride + head * query_head_stride + row.to(tl.int64) * query_stride
                query = load_tile(query_ptr, offset, row < queries, 0, DIM, HEAD_DIM)  # [R, DIM]
                lse = tl.load(lse_ptr + first + row, mask=row < queries, other=0.0)
                lse = tl.where(lse == float("-inf"), 0.0, lse)
                logits = dot(query, tl.trans(landmark), tl.zeros([BLOCK_ROWS, BLOCK_CHUNKS], tl.float32))  # [R, C]
                logits = bound_logits(logits, scale, softcap, SOFTCAPPED)
                # the logits of chunks that are not open may exceed the log-sum-exp
                logits = tl.where(is_open[None, :] & counts[:, None], logits, float("-inf"))
                share += tl.sum(tl.exp(logits - lse[:, None]), 0)
        scores = tl.maximum(scores, share, tl.PropagateNan.ALL) if TAKES_MAX else scores + share
    tl.store(scores_ptr + owner + chunk, tl.where(is_open, scores * FACTOR, float("-inf")), mask=chunk_ok)


def aot_calls() -> None:
    for head_dim in (64, 80, 128, 256):
        for dtype in AOT_DTYPES:
            query, queries = (shaped(2, 32, count, head_dim, dtype=dtype) for count in (1, 7))
            landmarks, is_open = shaped(2, 8, 500, head_dim, dtype=dtype), shaped(2, 8, 500)
            visible = shaped(2, 7, dtype=torch.bool)
            chunk_scores(query, landmarks, is_open.bool(), LogitSpec(0.1))
            chunk_scores(queries, landmarks, is_open.bool(), LogitSpec(0.1, softcap=30.0), visible, "sum")
