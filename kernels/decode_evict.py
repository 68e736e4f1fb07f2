"""One H2O decode step in two launches: attend, score, choose the victim, overwrite in place (arXiv:2306.14048).

    the new token takes the spare slot; every slot sees the query
    score[j] = memory * score[j] + sum over the group of softmax(q.k)[j]
    where a head holds more than its limit, the slot of least score that is neither recent nor a sink becomes the spare

The first launch is that of `decode_attention`: the splits' outputs, their log-sum-exps, and the logits of the old
slots. The second adds the new token's own logit, which it computes itself, so that the token need not be stored
before it is attended to. It merges the splits, turns logits into probabilities, adds them to the scores and finds the
victim on the way. Several programs share a head; the last to finish compares their candidates.

Bytes 2 * batch * kv_heads * slots * head_dim * element size for K and V; 8 * heads for the logits, 8 * kv_heads for
the scores and 4 * kv_heads for the positions, each * batch * slots. As separate operations, the same step takes ten
launches and reads scores and positions four times.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import AOT_DTYPES, attends_in_triton, core_count, launch, op, shaped, tl, triton
from kvcompress.kernels.common.split_attention import launch_split
from kvcompress.kernels.common.tile import bound_logits, wide
from kvcompress.kernels.decode import (
    decode_attention,
    decode_attention_reference,
    finish_blocks,
    group_lse,
    group_probabilities,
    load_logits,
    merge_head,
)
from kvcompress.kernels.evict import choose_victim, choose_victim_reference, first_to_go, rank, worse

EMPTY = -1


class Slots(NamedTuple):
    """What a cache holds in slots, some of them empty.

    keys, values: [batch, kv_heads, slots, head_dim] and value_dim.
    positions: [batch, kv_heads, slots] int32, EMPTY marks an empty slot.
    scores: [batch, kv_heads, slots] float32.
    spare: [batch, kv_heads] int64, an empty slot of each head: the one that the next token takes.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    spare: Tensor


@op(fake=lambda query, value, **_: query.new_empty(*query.shape[:-1], value.shape[-1]), mutates=("slots",))
def decode_and_evict(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    token_positions: Tensor,
    limits: Tensor,
    recents: Tensor,
    spec: LogitSpec,
    sinks: int = 0,
    memory: float = 1.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of one new token to itself and to the cache slots, which are updated in place.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: of the new token, [batch, kv_heads, 1, head_dim] and value_dim.
        slots: all are written to: the token goes into the spare slot, scores are updated, and the victim's slot becomes
            the next spare one.
        token_positions: [batch] int32, position of the new token; -1 where it is padding, which changes no slot.
        limits: [batch] int32, tokens a head may hold, fewer than slots.
        recents: [batch] int32, newest tokens that stay, at least 1.
        spec: with a window, what the next token will not see goes first.
        sinks: positions below it stay.
        memory: how much of its old score a slot keeps; 1 accumulates (H2O), 1 - 1 / w fades over w queries (SnapKV).
        sink_logits: [heads], as in decode_attention.

    Returns:
        The output, [batch, heads, 1, value_dim] in query's dtype.
    """
    if query.shape[2] != 1 or key.shape[2] != 1:
        raise ValueError(
            f"decode_and_evict takes one token per sequence, got query {list(query.shape)}, key {list(key.shape)}"
        )
    if not all(tensor.is_contiguous() for tensor in slots[2:]):
        raise ValueError("decode_and_evict writes to positions, scores and spare, which must be contiguous")
    run = _launch if attends_in_triton(query) else decode_then_evict
    return run(query, key, value, slots, token_positions, limits, recents, spec, sinks, memory, sink_logits)


def decode_then_evict(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    token_positions: Tensor,
    limits: Tensor,
    recents: Tensor,
    spec: LogitSpec,
    sinks: int = 0,
    memory: float = 1.0,
    sink_logits: Tensor | None = None,
    attend: Callable[..., tuple[Tensor, Tensor]] = decode_attention,
    choose: Callable[..., Tensor] = choose_victim,
) -> Tensor:
    """decode_and_evict in separate operations: what a CPU runs, and what one op has to beat on a GPU."""
    keys, values, positions, scores, spare = slots
    real = (token_positions != EMPTY)[:, None, None]
    slot = spare[..., None]
    for stored, new in ((keys, key), (values, value)):
        index = slot[..., None].expand(-1, -1, -1, new.shape[-1])
        stored.scatter_(2, index, torch.where(real[..., None], new, stored.gather(2, index)))
    positions.scatter_(2, slot, torch.where(real, token_positions[:, None, None], positions.gather(2, slot)))
    scores.scatter_(2, slot, torch.where(real, 0.0, scores.gather(2, slot)))
    out, attention = attend(query, keys, values, positions, token_positions[:, None], spec, sink_logits)
    scores.copy_(torch.where(real, scores * memory + attention, scores))

    newest = token_positions + 1
    ranked = scores
    if spec.window is not None:
        # what has left the window goes first, sinks too
        ranked = ranked.masked_fill(positions < sinks, torch.inf)
        ranked = ranked.masked_fill(positions <= (newest - spec.window)[:, None, None], -torch.inf)
        sinks = 0
    victims = choose(ranked, positions, newest - recents, sinks)[..., None]
    over = ((positions != EMPTY).sum(-1, keepdim=True) > limits[:, None, None]) & real
    positions.scatter_(2, victims, torch.where(over, EMPTY, positions.gather(2, victims)))
    spare.copy_(torch.where(real[..., 0], positions.argmin(-1), spare))
    return out


# what decode_and_evict means, in plain PyTorch
decode_and_evict_reference = functools.partial(
    decode_then_evict, attend=decode_attention_reference, choose=choose_victim_reference
)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    token_positions: Tensor,
    limits: Tensor,
    recents: Tensor,
    spec: LogitSpec,
    sinks: int,
    memory: float,
    sink_logits: Tensor | None,
) -> Tensor:
    keys, values, positions, scores, _ = slots
    batch, heads, _, head_dim = query.shape
    kv_heads, count = keys.shape[1:3]
    value_dim, group = values.shape[-1], heads // kv_heads
    logits = query.new_empty(batch, kv_heads, count, group, dtype=torch.float32)
    tickets = positions.new_empty(batch, kv_heads)
    parts, lses = launch_split(
        query, keys, values, spec, None, positions, token_positions[:, None], None, logits, tickets, merge=False
    )
    out = query.new_empty(batch, heads, 1, value_dim)
    chunk = _chunk(batch * kv_heads, count, query.device)
    chunks = triton.cdiv(count, chunk)
    window, scale, softcap = spec.arguments
    # what each program found: a score; a position, a slot, an empty slot, and the number of tokens it counted
    least = scores.new_empty(batch * kv_heads, chunks)
    found = positions.new_empty(4, batch * kv_heads, chunks)
    launch(
        _evict_kernel, (chunks, kv_heads, batch),
        query.contiguous(), key.contiguous(), value.contiguous(), *slots,
        token_positions.contiguous(), limits.contiguous(), recents.contiguous(),
        parts, lses, sink_logits, logits, out, least, found, tickets,
        *keys.stride()[:3], *values.stride()[:3],
        batch, kv_heads, count, chunk, len(parts), window, sinks, scale, softcap, memory,
        GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim, **spec.constants, BLOCK_CHUNKS=_MOST_CHUNKS,
        BLOCK_DIM=triton.next_power_of_2(head_dim), **finish_blocks(group, value_dim, _CHUNK),
    )  # fmt: skip
    return out


# slots of a program of the second launch, or a multiple; programs per multiprocessor; the most programs per head
_CHUNK = 512
_PROGRAMS_PER_CORE = 4
_MOST_CHUNKS = 128


def _chunk(owners: int, slots: int, device: torch.device) -> int:
    """How many slots each program takes: as few programs as fill the GPU, as each repeats what a head needs once."""
    programs = max(1, min(_PROGRAMS_PER_CORE * core_count(device) // owners, _MOST_CHUNKS))
    return -(-slots // (programs * _CHUNK)) * _CHUNK


@triton.jit
def settle(positions_ptr, spare_ptr, slots, token_position, limit, taken, victim, empty, kept):
    # the new token's slot is taken and, over the limit, the victim's is freed; the two may be the same
    over = kept > limit
    tl.store(positions_ptr + taken, tl.where(over & (victim == taken), -1, token_position))
    tl.store(positions_ptr + victim, -1, mask=over & (victim != taken))
    # the free slot of the lowest index; there is none only if the limit is not below the number of slots
    free = tl.minimum(empty, tl.where(over, victim, 2147483647))
    tl.store(spare_ptr, free.to(tl.int64), mask=free < slots)


@triton.jit(do_not_specialize=["batch_size", "slots", "chunk", "splits", "window", "sinks"])
def _evict_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, positions_ptr, scores_ptr, spare_ptr,
    token_positions_ptr, limits_ptr, recents_ptr,
    parts_ptr, lses_ptr, sink_logits_ptr, logits_ptr, out_ptr, least_ptr, found_ptr, tickets_ptr,
    keys_batch_stride, keys_head_stride, keys_stride,
    values_batch_stride, values_head_stride, values_stride,
    batch_size, kv_heads, slots, chunk, splits, window, sinks, scale, softcap, memory,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    # one program owns `chunk` slots of one KV head and a share of its group's outputs; the first stores the new token
    batch = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    owner = batch * kv_heads + kv_head
    first_row = owner * GROUP
    rows = batch_size.to(tl.int64) * kv_heads * GROUP
    token_position = tl.load(token_positions_ptr + batch)
    real = token_position >= 0
    taken = tl.load(spare_ptr + owner).to(tl.int32)
    head = tl.arange(0, BLOCK_GROUP)  # [G]
    head_ok = head < GROUP
    dim = tl.arange(0, BLOCK_DIM)  # [D]
    value_dim = tl.arange(0, BLOCK_VALUE)  # [V]
    column = tl.arange(0, BLOCK_SLOTS)  # [S]

    # loaded a block ahead, to hide the latency
    first_slot = tl.program_id(0) * chunk
    last_slot = tl.minimum(first_slot + chunk, slots)
    logits_ptr += owner * slots * GROUP
    positions_ptr += owner * slots
    scores_ptr += owner * slots
    logits = load_logits(
        logits_ptr + wide(first_slot) * GROUP, last_slot - first_slot, GROUP, BLOCK_GROUP, BLOCK_SLOTS
    )  # [S, G]
    position = tl.load(positions_ptr + first_slot + column, mask=column < last_slot - first_slot, other=2147483647)
    old_score = tl.load(scores_ptr + first_slot + column, mask=column < last_slot - first_slot, other=0.0)
    recent_from = token_position + 1 - tl.load(recents_ptr + batch)

    # the new token's own logit: it is in none of the splits, as its slot was empty
    key = tl.load(key_ptr + owner * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    value = tl.load(value_ptr + owner * VALUE_DIM + value_dim, mask=value_dim < VALUE_DIM, other=0.0)
    query = tl.load(
        query_ptr + (first_row + head)[:, None] * HEAD_DIM + dim[None, :],
        mask=head_ok[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )  # [G, D]
    own_logit = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    own_logit = bound_logits(own_logit, scale, softcap, SOFTCAPPED)
    own_logit = tl.where(head_ok & real, own_logit, float("-inf"))

    past_lse = group_lse(lses_ptr, sink_logits_ptr, kv_head, first_row, rows, splits, GROUP, BLOCK_GROUP, BLOCK_SPLITS)
    peak = tl.maximum(past_lse, own_logit)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp(past_lse - shift) + tl.exp(own_logit - shift)
    lse = tl.where(total == 0, float("-inf"), shift + tl.log(total))
    own = tl.exp(own_logit - tl.where(lse == float("-inf"), 0.0, lse))  # [G]

    for g in range(tl.program_id(0), GROUP, tl.num_programs(0)):
        row = first_row + g
        head_lse = tl.sum(tl.where(head == g, lse, 0.0), 0)
        out = merge_head(parts_ptr, lses_ptr, row, rows, splits, head_lse, VALUE_DIM, BLOCK_VALUE)
        out += tl.sum(tl.where(head == g, own, 0.0), 0) * value.to(tl.float32)
        tl.store(out_ptr + row * VALUE_DIM + value_dim, out.to(out_ptr.dtype.element_ty), mask=value_dim < VALUE_DIM)

    if (tl.program_id(0) == 0) & real:
        keys_ptr += batch * keys_batch_stride + kv_head.to(tl.int64) * keys_head_stride
        values_ptr += batch * values_batch_stride + kv_head.to(tl.int64) * values_head_stride
        tl.store(keys_ptr + taken.to(tl.int64) * keys_stride + dim, key, mask=dim < HEAD_DIM)
        tl.store(values_ptr + taken.to(tl.int64) * values_stride + value_dim, value, mask=value_dim < VALUE_DIM)

    least = tl.full([BLOCK_SLOTS], float("inf"), tl.float32)
    lowest = tl.full([BLOCK_SLOTS], 2147483647, tl.int32)
    victim = tl.full([BLOCK_SLOTS], 2147483647, tl.int32)
    empty = tl.full([BLOCK_SLOTS], 2147483647, tl.int32)
    kept = tl.zeros([BLOCK_SLOTS], tl.int32)
    for start in range(first_slot, last_slot, BLOCK_SLOTS):
        slot = start + column
        slot_ok = slot < last_slot
        is_own = slot == taken
        position = tl.where(is_own, token_position, position)
        score = memory * old_score + group_probabilities(logits, lse)
        score = tl.where(is_own, tl.sum(own, 0), score)
        if real:
            tl.store(scores_ptr + start + column, score, mask=slot_ok)

        stays = (position < sinks) | (position >= recent_from)
        ranked = tl.where(stays | (position < 0), float("inf"), rank(score))
        if WINDOWED:
            gone = (position <= token_position + 1 - window) & (position >= 0) & (position < recent_from)
            ranked = tl.where(gone, float("-inf"), ranked)
        least, lowest, victim = worse(ranked, position, slot, least, lowest, victim)
        empty = tl.minimum(empty, tl.where(position < 0, slot, 2147483647))
        kept += (slot_ok & (position >= 0)).to(tl.int32)

        ahead = start + BLOCK_SLOTS
        logits = load_logits(logits_ptr + wide(ahead) * GROUP, last_slot - ahead, GROUP, BLOCK_GROUP, BLOCK_SLOTS)
        position = tl.load(positions_ptr + ahead + column, mask=column < last_slot - ahead, other=2147483647)
        old_score = tl.load(scores_ptr + ahead + column, mask=column < last_slot - ahead, other=0.0)

    score, position, slot = first_to_go(least, lowest, victim)
    chunks = tl.num_programs(0)
    field = batch_size.to(tl.int64) * kv_heads * chunks
    place = owner * chunks + tl.program_id(0)
    tl.store(least_ptr + place, score)
    tl.store(found_ptr + place, position)
    tl.store(found_ptr + field + place, slot)
    tl.store(found_ptr + 2 * field + place, tl.min(empty, 0))
    tl.store(found_ptr + 3 * field + place, tl.sum(kept, 0))
    # the program with the last ticket sees what all others of this head have stored, and none of them still reads
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + owner, 1, sem="acq_rel")
    if (ticket == chunks - 1) & real:
        tl.debug_barrier()
        other = tl.arange(0, BLOCK_CHUNKS)
        other_ok = other < chunks
        base = owner * chunks
        their_score = tl.load(least_ptr + base + other, mask=other_ok, other=float("inf"))
        their_position = tl.load(found_ptr + base + other, mask=other_ok, other=2147483647)
        their_slot = tl.load(found_ptr + field + base + other, mask=other_ok, other=2147483647)
        their_empty = tl.load(found_ptr + 2 * field + base + other, mask=other_ok, other=2147483647)
        their_count = tl.load(found_ptr + 3 * field + base + other, mask=other_ok, other=0)
        _, _, going = first_to_go(their_score, their_position, their_slot)
        settle(
            positions_ptr, spare_ptr + owner, slots, token_position, tl.load(limits_ptr + batch), taken, going,
            tl.min(their_empty, 0), tl.sum(their_count, 0),
        )  # fmt: skip


def aot_calls() -> None:
    def call(group: int, head_dim: int, dtype: torch.dtype, spec: LogitSpec, sink_logits: Tensor | None = None) -> None:
        query, token = (shaped(1, heads, 1, head_dim, dtype=dtype) for heads in (2 * group, 2))
        keys, scores = shaped(1, 2, 900, head_dim, dtype=dtype), shaped(1, 2, 900)
        slots = Slots(keys, keys, scores.int(), scores, shaped(1, 2, dtype=torch.int64))
        count = shaped(1, dtype=torch.int32)
        decode_and_evict(query, token, token, slots, count, count, count, spec, sink_logits=sink_logits)

    for group in (1, 4, 64):
        for head_dim in (64, 128, 256):
            for dtype in AOT_DTYPES:
                call(group, head_dim, dtype, LogitSpec(0.1))
                sinks = shaped(2 * group, dtype=dtype)
                call(group, head_dim, dtype, LogitSpec(0.1, window=700, softcap=30.0), sinks)
