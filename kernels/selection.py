"""Which chunks a query attends to, which of them lie in the buffer already, and where the others go (ShadowKV,
arXiv:2410.21465, algorithm 2 and section 4).

    wanted = the chunks of highest score, as many as there are slots (kernels/chunk_scores.py)

A chunk that was selected before and is again stays in its slot; one that is new takes a slot whose chunk is no longer
wanted. For one query a sequence all of it is one launch: programs write the logits of their chunks, and the last of a
KV head to end makes scores of them, finds the least score that is wanted by bisecting its bits, and hands out slots.

Bytes: the landmarks once, batch * kv_heads * chunks * head_dim * element size, beside 12 * group + 12 bytes a chunk and
KV head for logits and scores, most of it in the L2 cache, where the bisection reads up to 31 times 4 bytes more.
Flops 2 * batch * heads * chunks * head_dim. Bound by bandwidth, 1 / (2 * chunk) of what dense decoding reads, and at
small batches by the one program that bisects.
"""

import torch
from torch import Tensor

from kvcompress.kernels.chunk_scores import Group, chunk_scores, chunk_scores_reference
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, launch, op, runs_triton, shaped, tl, triton
from kvcompress.kernels.common.split_attention import split_keys
from kvcompress.kernels.common.tile import MIN_SIDE, bound_logits, dot, load_tile, rows_aligned, tile_width, wide
from kvcompress.kernels.decode import load_logits

EMPTY = -1


@op(
    fake=lambda held, **_: held.new_empty(held.shape, dtype=torch.bool),
    mutates=("held", "positions", "fetched"),
)
def select_chunks(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    held: Tensor,
    positions: Tensor,
    limits: Tensor,
    fetched: Tensor,
    spec: LogitSpec,
    chunk: int,
    hidden: Tensor | None = None,
    visible: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """Gives the chunks that a block of queries cares for most their slots: those they have, or ones that are free.

    Args:
        query, landmarks, is_open, visible, group: as in chunk_scores; at least as many chunks as slots.
        held: [batch, kv_heads, slots] int64, the chunk in each slot, -1 for none. Written.
        positions: [batch, kv_heads, at least slots * chunk] int32, places of the tokens in the slots, which come first;
            -1 for none. Written where a slot's chunk changes.
        limits: [batch] int64, chunks that a sequence may select.
        fetched: [2] int64: slots that were given to another chunk, and calls. Written.
        spec: of the attention's logits, without a window.
        chunk: tokens of a chunk.
        hidden: [batch, tokens] bool, tokens that nobody sees, by their place. None: there are none.

    Returns:
        Which slots have a new chunk, [batch, kv_heads, slots] bool: of those that are free the first ones. Which of the
        new chunks takes which of them does not matter, and of chunks of one score any may be chosen.

    Raises:
        ValueError: held, positions or fetched are not contiguous.
    """
    if not (held.is_contiguous() and positions.is_contiguous() and fetched.is_contiguous()):
        raise ValueError("select_chunks writes to held, positions and fetched, which must be contiguous")
    run = _launch if runs_triton(query) and query.numel() and held.numel() else select_chunks_reference
    return run(query, landmarks, is_open, held, positions, limits, fetched, spec, chunk, hidden, visible, group)


def select_chunks_reference(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    held: Tensor,
    positions: Tensor,
    limits: Tensor,
    fetched: Tensor,
    spec: LogitSpec,
    chunk: int,
    hidden: Tensor | None = None,
    visible: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """What select_chunks means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    slots = held.shape[2]
    scores = chunk_scores_reference(query, landmarks, is_open, spec, visible, group)
    found, wanted = scores.topk(slots, -1)
    over = torch.arange(slots, device=held.device) >= limits[:, None, None]
    wanted = wanted.masked_fill_((found == -torch.inf) | over, EMPTY)
    now, is_new = reuse_slots(held, wanted, is_open.shape[2])
    held.copy_(now)
    positions[:, :, : slots * chunk] = chunk_positions(held, chunk, hidden)
    fetched[0] += is_new.sum()
    fetched[1] += 1
    return is_new


def reuse_slots(held: Tensor, wanted: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The chunk that each slot has, [batch, kv_heads, slots] int64, where these are wanted, and whether it is new.

    Args:
        held, wanted: distinct chunks, [batch, kv_heads, slots] int64, in any order, -1 for none.
        chunks: more than any chunk's number.
    """
    # -1 is the last place
    marks = torch.zeros(*held.shape[:2], chunks + 1, dtype=torch.bool, device=held.device)
    at_held, at_wanted = (x.masked_fill(x < 0, chunks) for x in (held, wanted))
    stays = marks.scatter(2, at_wanted, True).gather(2, at_held) & (held >= 0)
    comes = ~marks.scatter(2, at_held, True).gather(2, at_wanted) & (wanted >= 0)
    # free slots first and new chunks first, each in order
    slots = stays.to(torch.uint8).argsort(dim=-1, stable=True)
    order = comes.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)
    is_new, fresh = comes.gather(2, order), wanted.gather(2, order)
    remaining = held.masked_fill(~stays, EMPTY)
    now = remaining.scatter(2, slots, torch.where(is_new, fresh, remaining.gather(2, slots)))
    return now, torch.zeros_like(stays).scatter(2, slots, is_new)


def chunk_positions(chunks: Tensor, chunk: int, hidden: Tensor | None) -> Tensor:
    """Places of the tokens of chunks [batch, kv_heads, any], -1 for none and for hidden ones,
    [batch, kv_heads, any * chunk] int32."""
    within = torch.arange(chunk, dtype=torch.int32, device=chunks.device)
    places = chunks.to(torch.int32)[..., None] * chunk + within
    places = places.masked_fill((chunks == EMPTY)[..., None], EMPTY).flatten(2)
    if hidden is not None:
        rows = hidden[:, None].expand(-1, places.shape[1], -1)
        places = places.masked_fill(rows.gather(2, places.clamp(min=0).long()), EMPTY)
    return places


def _launch(
    query: Tensor,
    landmarks: Tensor,
    is_open: Tensor,
    held: Tensor,
    positions: Tensor,
    limits: Tensor,
    fetched: Tensor,
    spec: LogitSpec,
    chunk: int,
    hidden: Tensor | None,
    visible: Tensor | None,
    group: Group,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads, chunks = landmarks.shape[1:3]
    scores = logits = tickets = None
    splits, split_chunks, block = 1, chunks, _block(head_dim, query.element_size())
    if queries == 1:
        query, landmarks = rows_aligned(query), rows_aligned(landmarks)
        splits, split_chunks = split_keys(batch * kv_heads, chunks, block, query.device)
        logits = query.new_empty(batch, kv_heads, chunks, heads // kv_heads, dtype=torch.float32)
        tickets = query.new_zeros(batch, kv_heads, dtype=torch.int32)
    else:
        scores = chunk_scores(query, landmarks, is_open, spec, visible, group)
    order = held.new_empty(batch, kv_heads, chunks, dtype=torch.int32)
    taken = held.new_empty(held.shape, dtype=torch.int32)
    is_new = held.new_empty(held.shape, dtype=torch.bool)
    side = triton.next_power_of_2(heads // kv_heads)
    launch(
        _select_chunks_kernel, (splits, kv_heads, batch),
        query, landmarks, is_open.contiguous().view(torch.uint8),
        None if visible is None else visible.contiguous().view(torch.uint8),
        None if hidden is None else hidden.contiguous().view(torch.uint8),
        limits, scores, logits, tickets, order, taken, held, is_new.view(torch.uint8), positions, fetched,
        *query.stride()[:2], *landmarks.stride()[:3], limits.stride(0),
        chunks, held.shape[2], splits, split_chunks, positions.shape[2], 0 if hidden is None else hidden.shape[1],
        *spec.arguments[1:],
        GROUP=heads // kv_heads, HEAD_DIM=head_dim, DIM=tile_width(head_dim), SOFTCAPPED=spec.softcap is not None,
        TAKES_MAX=group == "max", CHUNK=chunk, CHUNK_SIDE=triton.next_power_of_2(chunk),
        BLOCK_ROWS=max(MIN_SIDE, side), GROUP_SIDE=side, BLOCK_CHUNKS=block, SCORED=max(16, 1024 // side),
        BISECTED=_BISECTED, SLOTS=max(16, 1024 // triton.next_power_of_2(chunk)), num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return is_new


# scores that are compared at a time
_BISECTED = 2048
_WARPS, _STAGES = 4, 4


def _block(head_dim: int, element_size: int) -> int:
    """Landmarks of a tile, 16 KiB of them."""
    return max(MIN_SIDE, min(64, 2**14 // (tile_width(head_dim) * element_size)))


@triton.jit
def _write_logits(
    query_ptr, landmarks_ptr, open_ptr, logits_ptr,
    query_head_stride, landmark_stride, first, last, chunks, scale, softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    # the logits [chunks, GROUP] of the chunks first .. last of one KV head, -inf where they are not open
    row = tl.arange(0, BLOCK_ROWS)  # [R]
    row_ok = row < GROUP
    query = load_tile(query_ptr, wide(row) * query_head_stride, row_ok, 0, DIM, HEAD_DIM)  # [R, DIM]
    for start in range(first, tl.minimum(last, chunks), BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)  # [C]
        chunk_ok = chunk < chunks
        landmark = load_tile(landmarks_ptr, wide(chunk) * landmark_stride, chunk_ok, 0, DIM, HEAD_DIM)  # [C, DIM]
        is_open = tl.load(open_ptr + chunk, mask=chunk_ok, other=0) != 0
        logits = dot(query, tl.trans(landmark), tl.zeros([BLOCK_ROWS, BLOCK_CHUNKS], tl.float32))  # [R, C]
        logits = tl.where(is_open[None, :], bound_logits(logits, scale, softcap, SOFTCAPPED), float("-inf"))
        offset = chunk[None, :] * GROUP + row[:, None]
        tl.store(logits_ptr + offset, logits, mask=row_ok[:, None] & chunk_ok[None, :])


@triton.jit
def _in_order(score, is_open):
    # scores as integers of the same order, those that are not open last and NaN first
    bits = tl.where(score == score, score, float("nan")).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(is_open, bits, -1)


@triton.jit
def _rank_logits(
    logits_ptr, open_ptr, order_ptr, is_visible, chunks,
    GROUP: tl.constexpr,
    GROUP_SIDE: tl.constexpr,
    TAKES_MAX: tl.constexpr,
    SCORED: tl.constexpr,
):  # fmt: skip
    # probabilities of one KV head's chunks, and what its heads agree on; a mean has the order of a sum
    peak = tl.full([GROUP_SIDE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_SIDE], tl.float32)
    for start in range(0, chunks, SCORED):
        logits = load_logits(logits_ptr + wide(start) * GROUP, chunks - start, GROUP, GROUP_SIDE, SCORED)  # [C, G]
        risen = tl.maximum(peak, tl.max(logits, 0))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[None, :]), 0)
        peak = risen
    lse = tl.where(total == 0, 0.0, peak + tl.log(total))
    for start in range(0, chunks, SCORED):
        logits = load_logits(logits_ptr + wide(start) * GROUP, chunks - start, GROUP, GROUP_SIDE, SCORED)
        share = tl.where(is_visible, tl.exp(logits - lse[None, :]), 0.0)
        # the sum of what is not there is 0, but in a head whose logits are NaN
        share = tl.where((tl.arange(0, GROUP_SIDE) < GROUP)[None, :], share, 0.0)
        score = tl.sum(share, 1)
        if TAKES_MAX:
            score = tl.where(score == score, tl.max(share, 1), score)
        chunk = start + tl.arange(0, SCORED)
        is_open = tl.load(open_ptr + chunk, mask=chunk < chunks, other=0) != 0
        tl.store(order_ptr + chunk, _in_order(score, is_open), mask=chunk < chunks)


@triton.jit
def _count_from(order_ptr, chunks, least, BISECTED: tl.constexpr):
    # how many chunks rank at least so high
    count = tl.zeros([BISECTED], tl.int32)
    for start in range(0, chunks, BISECTED):
        chunk = start + tl.arange(0, BISECTED)
        count += (tl.load(order_ptr + chunk, mask=chunk < chunks, other=-1) >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mark_wanted(order_ptr, chunks, wanted, BISECTED: tl.constexpr):
    # 1 for the chunks that rank highest, `wanted` of them, and 0 for the others: the wanted-th rank lies from `least`
    # on and below `beyond`, and between equals the first are taken
    least = tl.full((), 0, tl.int32)
    beyond = tl.full((), 0x7FFFFFFF, tl.int32)
    found = tl.full((), -1, tl.int32)
    while (beyond - least > 1) & (found != wanted):
        middle = least + (beyond - least) // 2
        found = _count_from(order_ptr, chunks, middle, BISECTED)
        is_enough = found >= wanted
        least = tl.where(is_enough, middle, least)
        beyond = tl.where(is_enough, beyond, middle)
    equals = wanted - _count_from(order_ptr, chunks, least + 1, BISECTED)
    for start in range(0, chunks, BISECTED):
        chunk = start + tl.arange(0, BISECTED)
        rank = tl.load(order_ptr + chunk, mask=chunk < chunks, other=-1)
        is_equal = (rank == least).to(tl.int32)
        is_wanted = (rank > least) | ((is_equal != 0) & (tl.cumsum(is_equal, 0) <= equals))
        equals -= tl.sum(is_equal, 0)
        tl.store(order_ptr + chunk, is_wanted.to(tl.int32), mask=chunk < chunks)


@triton.jit
def _hand_out(
    order_ptr, taken_ptr, held_ptr, new_ptr, positions_ptr, hidden_ptr, chunks, slots,
    CHUNK: tl.constexpr,
    CHUNK_SIDE: tl.constexpr,
    BISECTED: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    # slots of one KV head for the chunks that are marked; how many chunks are new. Through memory: what is marked and
    # held is unmarked, the i-th chunk that is marked still is written where the i-th free slot finds it
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        held = tl.load(held_ptr + slot, mask=slot < slots, other=-1)
        stays = tl.load(order_ptr + held, mask=held >= 0, other=0) != 0
        # few slots lie in several threads, all of which read before one writes
        tl.debug_barrier()
        tl.store(order_ptr + held, 0, mask=stays)
        tl.store(held_ptr + slot, tl.where(stays, held, -1), mask=slot < slots)
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    for start in range(0, chunks, BISECTED):
        chunk = start + tl.arange(0, BISECTED)
        comes = tl.load(order_ptr + chunk, mask=chunk < chunks, other=0)
        tl.store(taken_ptr + count + tl.cumsum(comes, 0) - 1, chunk, mask=comes != 0)
        count += tl.sum(comes, 0)
    tl.debug_barrier()
    within = tl.arange(0, CHUNK_SIDE)
    given = tl.full((), 0, tl.int32)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        is_free = (tl.load(held_ptr + slot, mask=slot < slots, other=0) < 0).to(tl.int32)
        tl.debug_barrier()
        turn = given + tl.cumsum(is_free, 0) - 1
        is_new = (is_free != 0) & (turn < count)
        chunk = tl.load(taken_ptr + turn, mask=is_new, other=-1)
        tl.store(held_ptr + slot, chunk.to(tl.int64), mask=is_new)
        tl.store(new_ptr + slot, is_new.to(tl.uint8), mask=slot < slots)
        place = chunk[:, None] * CHUNK + within[None, :]
        is_there = is_new[:, None] & (within < CHUNK)[None, :]
        if hidden_ptr is not None:
            is_there = is_there & (tl.load(hidden_ptr + place, mask=is_there, other=0) == 0)
        at = slot[:, None] * CHUNK + within[None, :]
        changes = (is_free != 0)[:, None] & (within < CHUNK)[None, :]
        tl.store(positions_ptr + at, tl.where(is_there, place, -1), mask=changes)
        given += tl.sum(is_free, 0)
    return count


@triton.jit(do_not_specialize=["chunks", "slots", "splits", "split_chunks", "room", "tokens"])
def _select_chunks_kernel(
    query_ptr, landmarks_ptr, open_ptr, visible_ptr, hidden_ptr, limits_ptr, scores_ptr, logits_ptr, tickets_ptr,
    order_ptr, taken_ptr, held_ptr, new_ptr, positions_ptr, fetched_ptr,
    query_batch_stride, query_head_stride, landmark_batch_stride, landmark_head_stride, landmark_stride, limit_stride,
    chunks, slots, splits, split_chunks, room, tokens, scale, softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    TAKES_MAX: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_SIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_SIDE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    SCORED: tl.constexpr,
    BISECTED: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    # one program owns one split of a KV head's chunks, and the last of them to end the KV head; where the scores are
    # there already, there is one program a KV head
    batch = wide(tl.program_id(2))
    kv_head = wide(tl.program_id(1))
    owner = batch * tl.num_programs(1) + kv_head
    first = tl.program_id(0) * split_chunks
    open_ptr += owner * chunks
    order_ptr += owner * chunks
    if scores_ptr is None:
        query_ptr += batch * query_batch_stride + kv_head * GROUP * query_head_stride
        landmarks_ptr += batch * landmark_batch_stride + kv_head * landmark_head_stride
        logits_ptr += owner * chunks * GROUP
        _write_logits(
            query_ptr, landmarks_ptr, open_ptr, logits_ptr, query_head_stride, landmark_stride, first,
            first + split_chunks, chunks, scale, softcap, GROUP, HEAD_DIM, DIM, SOFTCAPPED, BLOCK_ROWS, BLOCK_CHUNKS,
        )  # fmt: skip
        # whoever draws the last ticket sees what all others of this KV head have stored
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets_ptr + owner, 1, sem="acq_rel")
    else:
        ticket = 0
    if ticket == splits - 1:
        if scores_ptr is None:
            is_visible = True
            if visible_ptr is not None:
                is_visible = tl.load(visible_ptr + batch) != 0
            _rank_logits(logits_ptr, open_ptr, order_ptr, is_visible, chunks, GROUP, GROUP_SIDE, TAKES_MAX, SCORED)
        else:
            for start in range(0, chunks, BISECTED):
                chunk = start + tl.arange(0, BISECTED)
                score = tl.load(scores_ptr + owner * chunks + chunk, mask=chunk < chunks, other=0.0)
                is_open = tl.load(open_ptr + chunk, mask=chunk < chunks, other=0) != 0
                tl.store(order_ptr + chunk, _in_order(score, is_open), mask=chunk < chunks)
        tl.debug_barrier()
        limit = tl.load(limits_ptr + batch * limit_stride).to(tl.int32)
        _mark_wanted(order_ptr, chunks, tl.minimum(limit, slots), BISECTED)
        tl.debug_barrier()
        if hidden_ptr is not None:
            hidden_ptr += batch * tokens
        count = _hand_out(
            order_ptr, taken_ptr + owner * slots, held_ptr + owner * slots, new_ptr + owner * slots,
            positions_ptr + owner * room, hidden_ptr, chunks, slots, CHUNK, CHUNK_SIDE, BISECTED, SLOTS,
        )  # fmt: skip
        tl.atomic_add(fetched_ptr, count.to(tl.int64))
        tl.atomic_add(fetched_ptr + 1, (owner == 0).to(tl.int64))


def aot_calls() -> None:
    for head_dim in (64, 80, 128, 256):
        for dtype in AOT_DTYPES:
            query, queries = (shaped(2, 32, count, head_dim, dtype=dtype) for count in (1, 7))
            landmarks, is_open = shaped(2, 8, 500, head_dim, dtype=dtype), shaped(2, 8, 500, dtype=torch.bool)
            held, positions = shaped(2, 8, 256, dtype=torch.int64), shaped(2, 8, 2600, dtype=torch.int32)
            limits, fetched = shaped(2, dtype=torch.int64), shaped(2, dtype=torch.int64)
            hidden, visible = shaped(2, 4000, dtype=torch.bool), shaped(2, 1, dtype=torch.bool)
            given = (landmarks, is_open, held, positions, limits, fetched)
            select_chunks(query, *given, LogitSpec(0.1), 8)
            capped = LogitSpec(0.1, softcap=30.0)
            select_chunks(query, *given, capped, 8, hidden=hidden, visible=visible, group="sum")
            select_chunks(queries, *given, LogitSpec(0.1), 8)
