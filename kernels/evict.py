"""The slot to give up: the lowest score among those that are neither recent nor a sink (H2O, arXiv:2306.14048).

Eviction frees the victim's slot and the next token overwrites it: 2 * batch * kv_heads * head_dim elements
per step, where compacting the cache would move every slot. Choosing reads 8 * batch * kv_heads * slots bytes.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import launch, op, runs_triton, shaped, tl, triton


@op(fake=lambda scores, **_: scores.new_empty(scores.shape[:2], dtype=torch.int64))
def choose_victim(scores: Tensor, positions: Tensor, recent_from: Tensor, sinks: int = 0) -> Tensor:
    """The occupied slot of least score outside the recent window and the sinks.

    Args:
        scores: [batch, kv_heads, slots] float32. NaN counts as the largest: what cannot be judged goes last.
        positions: [batch, kv_heads, slots] int32, -1 marks an empty slot.
        recent_from: [batch] int32; this position and those after it are protected.
        sinks: positions below it are protected.

    Returns:
        Slot indices, [batch, kv_heads] int64. Of equal scores the lowest position goes. Where nothing may go,
        some protected or empty slot: the caller evicts only when a sequence is over its budget.
    """
    if not runs_triton(scores) or not scores.numel():
        return choose_victim_reference(scores, positions, recent_from, sinks)
    batch, kv_heads, slots = scores.shape
    victims = scores.new_empty(batch, kv_heads, dtype=torch.int64)
    launch(
        _choose_victim_kernel, (kv_heads, batch),
        scores.contiguous(), positions.contiguous(), recent_from.contiguous(), victims, slots, sinks,
        BLOCK_SLOTS=_BLOCK_SLOTS,
    )  # fmt: skip
    return victims


def choose_victim_reference(scores: Tensor, positions: Tensor, recent_from: Tensor, sinks: int = 0) -> Tensor:
    """What choose_victim means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    protected = (positions < sinks) | (positions >= recent_from[:, None, None])
    scores = ranked(scores).masked_fill(protected, torch.inf)
    # of the slots with the least score, the one of the lowest position
    least = scores == scores.amin(-1, keepdim=True)
    return positions.masked_fill(~least, torch.iinfo(positions.dtype).max).argmin(-1)


def ranked(scores: Tensor) -> Tensor:
    """Scores that can be compared: NaN becomes the largest finite number, below only what is protected."""
    return scores.masked_fill(scores.isnan(), torch.finfo(scores.dtype).max)


_BLOCK_SLOTS = 1024


@triton.jit
def rank(score):
    # as `ranked`; all comparisons with NaN are false, and no slot would be found
    return tl.where(score == score, score, 3.4028234663852886e38)


@triton.jit
def worse(score, position, slot, least, lowest, victim):
    # the lower score goes, of equal scores the lower position, of equal positions (empty slots) the lower slot
    goes = (score < least) | ((score == least) & ((position < lowest) | ((position == lowest) & (slot < victim))))
    return tl.where(goes, score, least), tl.where(goes, position, lowest), tl.where(goes, slot, victim)


@triton.jit
def first_to_go(least, lowest, victim):
    # the candidates of a program's lanes, reduced to one
    score = tl.min(least, 0)
    position = tl.min(tl.where(least == score, lowest, 2147483647), 0)
    slot = tl.min(tl.where((least == score) & (lowest == position), victim, 2147483647), 0)
    return score, position, slot


@triton.jit(do_not_specialize=["slots", "sinks"])
def _choose_victim_kernel(
    scores_ptr, positions_ptr, recent_from_ptr, victims_ptr,
    slots, sinks,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    # one program owns one KV head of one sequence
    batch = tl.program_id(1).to(tl.int64)
    owner = batch * tl.num_programs(0) + tl.program_id(0)
    recent_from = tl.load(recent_from_ptr + batch)
    least = tl.full([BLOCK_SLOTS], float("inf"), tl.float32)
    lowest = tl.full([BLOCK_SLOTS], 2147483647, tl.int32)
    victim = tl.full([BLOCK_SLOTS], 2147483647, tl.int32)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)  # [S]
        slot_ok = slot < slots
        position = tl.load(positions_ptr + owner * slots + slot, mask=slot_ok, other=2147483647)
        score = tl.load(scores_ptr + owner * slots + slot, mask=slot_ok, other=float("inf"))
        score = tl.where((position < sinks) | (position >= recent_from), float("inf"), rank(score))
        least, lowest, victim = worse(score, position, slot, least, lowest, victim)
    score, position, slot = first_to_go(least, lowest, victim)
    tl.store(victims_ptr + owner, slot.to(tl.int64))


def aot_calls() -> None:
    positions, recent_from = shaped(2, 8, 1024, dtype=torch.int32), shaped(2, dtype=torch.int32)
    choose_victim(shaped(2, 8, 1024), positions, recent_from, 4)
