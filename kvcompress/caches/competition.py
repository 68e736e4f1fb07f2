"""Heads that compete for one budget: how many tokens each keeps (AdaKV, arXiv:2407.11550; KVzip, arXiv:2505.23416).

    of a pool of budget * heads tokens, each head keeps those of its own that are among the pool's best

Of a head's tokens some are out of the competition: those that always stay, and as many of its best as it needs to go
on. Numbers of tokens are rounded to ones with two digits after the leading binary one, 8, 10, 12, 14, 16, 20, so that
few differ, and heads of equal capacity can be computed together; what is rounded away goes to the heads that lost most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(worth: Sequence[Tensor], pool: Tensor, floor: Tensor) -> list[Tensor]:
    """How many tokens each head may keep.

    Args:
        worth: of each layer that competes, [batch, kv_heads, candidates] float32: inf for tokens that must stay, -inf
            for what is none or must go.
        pool: [batch] int64, tokens of all these heads together.
        floor: [batch] int64, how many of its tokens every head keeps.

    Returns:
        [batch, kv_heads] int64 of each layer, on its device. Sums are at most the pool, and where all that there is
        fits, what is left is shared equally.
    """
    there = pool.device
    number = [torch.arange(each.shape[-1], device=there) for each in worth]
    ordered = [each.to(there).sort(-1, descending=True).values for each in worth]
    ordered = [
        each.masked_fill((count < floor[:, None, None]) & (each > -torch.inf), torch.inf)
        for each, count in zip(ordered, number, strict=True)
    ]
    sizes = [each.shape[1:] for each in ordered]
    flat = torch.cat([each.flatten(1) for each in ordered], 1)
    best = flat.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(flat.shape[1], device=there) < pool[:, None]
    chosen = torch.zeros_like(chosen.expand_as(flat)).scatter(1, best, chosen.expand_as(flat)) & (flat > -torch.inf)
    parts = chosen.split([heads * candidates for heads, candidates in sizes], 1)
    counts = torch.cat([part.unflatten(1, size).sum(-1) for part, size in zip(parts, sizes, strict=True)], 1)
    available = torch.cat([(each > -torch.inf).sum(-1) for each in ordered], 1)
    counts = rounded(counts, available, floor)
    counts = counts + ((pool - counts.sum(-1)) // counts.shape[1])[:, None]
    of_layers = counts.split([heads for heads, _ in sizes], 1)
    return [count.to(each.device) for count, each in zip(of_layers, worth, strict=True)]


def rounded(counts: Tensor, available: Tensor, floor: Tensor) -> Tensor:
    """Numbers of few kinds with nearly the same sum, [batch, heads], none above `available` or below `floor`."""
    step = 2 ** (counts.clamp(min=4).log2().floor().long() - 2)
    down = torch.where(counts == available, counts, counts // step * step).maximum(floor[:, None].minimum(counts))
    lost, gain = counts - down, step.minimum(available - down)
    # whoever lost most of a step first
    order = (lost / step).masked_fill(gain == 0, -1.0).argsort(dim=-1, descending=True, stable=True)
    gain = gain.gather(1, order)
    given = gain.cumsum(-1) <= lost.sum(-1, keepdim=True)
    return down + torch.zeros_like(counts).scatter(1, order, gain * given)
