"""Which selected chunks are in the buffer already, and where the others go (ShadowKV, arXiv:2410.21465, section 4).

A chunk that was selected before and is selected again stays in its slot; a new one takes a slot whose chunk is no
longer selected. Bytes 25 * batch * kv_heads * slots; slots^2 comparisons per KV head, a few microseconds at any batch.
"""

import torch
from torch import Tensor

from kvcompress.kernels.common.runtime import launch, op, runs_triton, shaped, tl, triton


@op(fake=lambda held, **_: (held.new_empty(held.shape), held.new_empty(held.shape, dtype=torch.bool)))
def reuse_slots(held: Tensor, wanted: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Gives every wanted chunk a slot: the one it has, or one whose chunk is no longer wanted.

    Args:
        held: [batch, kv_heads, slots] int64, the chunk in each slot, -1 for none.
        wanted: [batch, kv_heads, slots] int64, distinct chunks in any order, -1 for none.
        chunks: greater than any chunk's number.

    Returns:
        The chunk each slot has now, [batch, kv_heads, slots] int64, and which of them are new there, bool. The i-th new
        chunk takes the i-th free slot.
    """
    batch, kv_heads, slots = held.shape
    # beyond, a program's row of slots would not fit its registers
    if not runs_triton(held) or not held.numel() or slots > _MOST_SLOTS:
        return reuse_slots_reference(held, wanted, chunks)
    now, is_new = held.new_empty(held.shape), held.new_empty(held.shape, dtype=torch.bool)
    launch(
        _reuse_slots_kernel, (kv_heads, batch),
        held.contiguous(), wanted.contiguous(), now, is_new.view(torch.uint8), slots,
        **_sides(slots), num_warps=_warps(slots),
    )  # fmt: skip
    return now, is_new


def reuse_slots_reference(held: Tensor, wanted: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """What reuse_slots means, in plain PyTorch: the oracle of its test and its path on a CPU."""
    # -1 is the index of the last place
    marks = torch.zeros(*held.shape[:2], chunks + 1, dtype=torch.bool, device=held.device)
    at_held, at_wanted = (x.masked_fill(x < 0, chunks) for x in (held, wanted))
    stays = marks.scatter(2, at_wanted, True).gather(2, at_held) & (held >= 0)
    comes = ~marks.scatter(2, at_held, True).gather(2, at_wanted) & (wanted >= 0)
    # free slots first and new chunks first, each in order
    slots = stays.to(torch.uint8).argsort(dim=-1, stable=True)
    order = comes.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)
    is_new = comes.gather(2, order)
    remaining = held.masked_fill(~stays, -1)
    now = remaining.scatter(2, slots, torch.where(is_new, wanted.gather(2, order), remaining.gather(2, slots)))
    return now, torch.zeros_like(stays).scatter(2, slots, is_new)


_MOST_SLOTS = 2048


def _sides(slots: int) -> dict[str, int]:
    """Sides of the tile of comparisons."""
    side = triton.next_power_of_2(slots)
    return {"SLOTS": side, "BLOCK": min(16, max(2, 2048 // side))}


def _warps(slots: int) -> int:
    return 4 if slots <= 512 else 8


@triton.jit
def _reuse_slots_kernel(
    held_ptr, wanted_ptr, now_ptr, new_ptr,
    slots,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # one program owns one KV head of one sequence
    owner = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * slots
    slot = tl.arange(0, SLOTS)  # [S]
    slot_ok = slot < slots
    held = tl.load(held_ptr + owner + slot, mask=slot_ok, other=-1)
    wanted = tl.load(wanted_ptr + owner + slot, mask=slot_ok, other=-1)
    stays = tl.zeros([SLOTS], tl.int32)
    known = tl.zeros([SLOTS], tl.int32)
    for start in range(0, slots, BLOCK):
        other = start + tl.arange(0, BLOCK)  # [B]
        some_wanted = tl.load(wanted_ptr + owner + other, mask=other < slots, other=-2)
        some_held = tl.load(held_ptr + owner + other, mask=other < slots, other=-2)
        stays += tl.sum((held[:, None] == some_wanted[None, :]).to(tl.int32), 1)
        known += tl.sum((wanted[:, None] == some_held[None, :]).to(tl.int32), 1)
    stays = (stays > 0) & (held >= 0)
    comes = (known == 0) & (wanted >= 0) & slot_ok
    free = slot_ok & (stays == 0)
    # the number of a free slot among the free, of a new chunk among the new
    free_rank = tl.cumsum(free.to(tl.int32), 0) - 1
    new_rank = tl.cumsum(comes.to(tl.int32), 0) - 1
    # through memory: the i-th new chunk is written where the i-th free slot finds it
    tl.store(now_ptr + owner + new_rank, wanted, mask=comes)
    tl.debug_barrier()
    is_new = free & (free_rank < tl.sum(comes.to(tl.int32), 0))
    taken = tl.load(now_ptr + owner + free_rank, mask=is_new, other=-1)
    tl.debug_barrier()
    tl.store(now_ptr + owner + slot, tl.where(stays, held, taken), mask=slot_ok)
    tl.store(new_ptr + owner + slot, is_new.to(tl.uint8), mask=slot_ok)


def aot_calls() -> None:
    for slots in (16, 256, _MOST_SLOTS):
        held = shaped(2, 8, slots, dtype=torch.int64)
        reuse_slots(held, held, 2 * slots)
