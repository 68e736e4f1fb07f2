"""How many tokens each head may keep where its share of the budget is fixed.

    count[h] = share[h] * x within [least, most], with one x for all heads of all layers, so that the mean is the budget

So the tokens that some heads cannot do without, or have no use for, are taken from or given to the others in proportion
to their shares. Shares are rounded to ones of few kinds (caches/competition.py), and equal shares get equal counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvcompress.caches.competition import rounded
from kvcompress.hf.tensor_parallel import TPGroup

# shares are rounded as so many parts of a head's mean share
_PARTS = 1024
# stands for a share of nothing
_LEAST = 1e-9
# what rounding errors of float64 may take from a whole number of tokens
_SLIP = 1e-6


@dataclass(frozen=True)
class Allotment:
    """The part of one layer's heads.

    own: [kv_heads] float64, the heads' shares, 1 on average over all layers. kinds: [kinds] float64, each share that
    occurs in any layer, once. heads: [kinds] float64, how many heads of all layers have it.
    """

    own: Tensor
    kinds: Tensor
    heads: Tensor

    @classmethod
    def of_layers(cls, shares: Sequence[Sequence[float]]) -> list[Self]:
        """What each layer's heads get; shares: [layers, kv_heads], not all 0."""
        given = torch.tensor(shares, dtype=torch.float64)
        given /= given.mean()
        parts = (given.flatten() * _PARTS).round().long()[None]
        few = rounded(parts, torch.full_like(parts, torch.iinfo(torch.int64).max), parts.new_zeros(1))[0].double()
        few = (few / few.mean()).clamp(min=_LEAST)
        kinds, counts = few.unique(return_counts=True)
        heads = counts.double()
        return [cls(own, kinds, heads) for own in few.view_as(given)]

    def of_rank(self, ranks: TPGroup | None) -> Self:
        """The part of the heads that this process has, of those that several share."""
        return self if ranks is None else type(self)(ranks.own_heads(self.own, 0), self.kinds, self.heads)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.own.to(device), self.kinds.to(device), self.heads.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"own": self.own, "kinds": self.kinds, "heads": self.heads}

    def of_count(self, mean: Tensor, least: int, lengths: Tensor) -> Tensor:
        """How many tokens heads may keep, of a budget of so many: all while all fit, and then none more than there are.

        Args:
            mean: [batch], tokens that heads of all layers may keep on average.
            least: tokens that a head cannot do without.
            lengths: [batch], tokens of the sequences.

        Returns:
            [batch, kv_heads] int32, rounded down.
        """
        mean, lengths = mean.double(), lengths.double()
        fits, least_of_row = lengths <= mean, mean.clamp(max=least)
        return self._counts(
            mean,
            torch.where(fits, least_of_row.maximum(lengths), least_of_row),
            torch.where(fits, mean * self.heads.sum(), lengths),
        )

    def of_fraction(self, fraction: float, mean: Tensor, least: int) -> Tensor:
        """The same of a budget that is a fraction of the tokens: numbers that grow with it, and so do not fall while
        single tokens come."""
        mean = mean.double()
        return self._counts(mean, mean.clamp(max=least), mean / fraction)

    def _counts(self, mean: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """How many tokens heads may keep.

        Args:
            mean: [batch] float64, of all heads of all layers.
            least, most: [batch] float64, of each head; least at most the mean, and most at least.
        """
        mean, least, most = mean[:, None], least[:, None], most[:, None]
        pool = mean * self.heads.sum()

        def total(x: Tensor) -> Tensor:
            part = (x[..., None] * self.kinds).maximum(least[..., None]).minimum(most[..., None])
            return (part * self.heads).sum(-1)

        # piecewise linear in x: bends where a kind leaves its least, or arrives at its most
        bends = torch.cat([torch.zeros_like(mean), least / self.kinds, most / self.kinds], -1)  # [batch, bends]
        totals = total(bends)
        below = totals <= pool
        start = bends.masked_fill(~below, 0.0).amax(-1, keepdim=True)
        stop = bends.masked_fill(below, torch.inf).amin(-1, keepdim=True)
        stop = torch.where(stop == torch.inf, start, stop)
        first, last = total(start), total(stop)
        x = start + (stop - start) * (pool - first) / (last - first).clamp(min=_SLIP)
        return ((x * self.own).maximum(least).minimum(most) + _SLIP).floor().int()
