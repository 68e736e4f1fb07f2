"""TOVA: keep the tokens that the newest query attends to (arXiv:2401.06104).

    score[j] = softmax(q_last . k)[j], averaged over all heads of the layer

so that all heads of a layer keep the same tokens, and nothing accumulates.
"""

from dataclasses import dataclass

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
        mean = candidates.attention.mean(1, keepdim=True)
        if candidates.mean_over_ranks is not None:
            mean = candidates.mean_over_ranks(mean)
        return mean.expand_as(candidates.scores)
