"""Which selected chunks are in the buffer already, and where the others go (ShadowKV, arXiv:2410.21465, section 4)."""

import torch
from torch import Tensor


def reuse_slots(held: Tensor, wanted: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Gives every wanted chunk a slot: the one it has, or one whose chunk is no longer wanted.

    Args:
        held: [batch, kv_heads, slots] int64, the chunk in each slot, -1 for none.
        wanted: [batch, kv_heads, slots] int64, distinct chunks in any order, -1 for none.
        chunks: more than any chunk's number.

    Returns:
        The chunk each slot has now, [batch, kv_heads, slots] int64, and which of them are new there, bool.
    """
    shape = (*held.shape[:2], chunks + 1)
    # -1 is the last place
    marks = torch.zeros(shape, dtype=torch.bool, device=held.device)
    at_held, at_wanted = (x.masked_fill(x < 0, chunks) for x in (held, wanted))
    stays = marks.scatter(2, at_wanted, True).gather(2, at_held) & (held >= 0)
    comes = ~marks.scatter(2, at_held, True).gather(2, at_wanted) & (wanted >= 0)
    # free slots first and new chunks first, each in order: the i-th new chunk takes the i-th free slot
    slots = stays.to(torch.uint8).argsort(dim=-1, stable=True)
    order = comes.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)
    is_new = comes.gather(2, order)
    remaining = held.masked_fill(~stays, -1)
    now = remaining.scatter(2, slots, torch.where(is_new, wanted.gather(2, order), remaining.gather(2, slots)))
    return now, torch.zeros_like(stays).scatter(2, slots, is_new)
