"""TOVA: keep the tokens that the newest query attends to (arXiv:2401.06104).

    score[j] = softmax(q_last . k)[j], averaged over all heads of the layer

so that all heads of a layer keep the same tokens, and nothing accumulates. Where heads have different shares of the
budget, the average is over those that hold the token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy


@register("tova", "what the newest query attends to", costs="sums of one query", paper="2401.06104")
@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """The paper's form: no window but the newest token."""

    @property
    def observes(self) -> int | None:
        return 1

    def score(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None
        if candidates.is_ragged:
            return _mean_of_tokens(candidates.attention, candidates.positions)
        mean = candidates.attention.mean(1, keepdim=True)
        if candidates.mean_over_ranks is not None:
            mean = candidates.mean_over_ranks(mean)
        return mean.expand_as(candidates.scores)


def _mean_of_tokens(attention: Tensor, positions: Tensor) -> Tensor:
    """Each token's attention, averaged over the heads that hold it, [batch, kv_heads, candidates].

    Args:
        attention: [batch, kv_heads, candidates].
        positions: of the same shape; each but the empty one once in a head.
    """
    ordered = positions.flatten(1).sort(dim=-1, stable=True)
    # tokens are numbered in the order of the text: as many as there are candidates at most
    numbers = torch.nn.functional.pad(ordered.values.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
    numbers = torch.empty_like(numbers).scatter_(1, ordered.indices, numbers)
    flat = attention.flatten(1)
    totals, heads = (torch.zeros_like(flat).scatter_add_(1, numbers, part) for part in (flat, torch.ones_like(flat)))
    return (totals / heads.clamp(min=1.0)).gather(1, numbers).view_as(attention)
