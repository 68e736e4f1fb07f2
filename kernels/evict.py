"""The slot to give up: the lowest score among those that are neither recent nor a sink (H2O, arXiv:2306.14048).

Eviction frees the victim's slot and the next token overwrites it: 2 * batch * kv_heads * head_dim elements
a step, where compacting the cache would move every slot.
"""

import torch
from torch import Tensor


def choose_victim(scores: Tensor, positions: Tensor, recent_from: Tensor, sinks: int = 0) -> Tensor:
    """The occupied slot of least score outside the recent window and the sinks.

    Args:
        scores: [batch, kv_heads, slots] float32.
        positions: [batch, kv_heads, slots] int32, -1 marks an empty slot.
        recent_from: [batch] int32; this position and those after it are protected.
        sinks: positions below it are protected.

    Returns:
        Slot indices, [batch, kv_heads] int64. Of equal scores the lowest position goes. Where nothing may go,
        some protected or empty slot: the caller evicts only when a sequence is over its budget.
    """
    protected = (positions < sinks) | (positions >= recent_from[:, None, None])
    scores = scores.masked_fill(protected, torch.inf)
    # of the slots with the least score, the one of the lowest position
    least = scores == scores.amin(-1, keepdim=True)
    return positions.masked_fill(~least, torch.iinfo(positions.dtype).max).argmin(-1)
