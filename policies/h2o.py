"""H2O: keep the heavy hitters, the tokens that received the most attention so far (arXiv:2306.14048).

    score[j] = sum over all queries i >= j seen so far of softmax(q_i . k)[j]

summed over the query heads that share a KV head (with one query head per KV head this is the paper's score). The
paper's formal algorithm uses the last step's attention; its text, its figures and all of its code accumulate, as here.
Sums are float32: in half precision a running sum stops growing at 2048.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates
from kvcompress.policies.second_stage import SecondStage


@register(
    "h2o",
    "heavy hitters + recent",
    costs="column sums of attention in prefill, one add per slot in decode",
    paper="2306.14048",
    label="H2OCache",
    tried={"second_stage": (0.0, 0.5)},
)
@dataclass(frozen=True, kw_only=True)
class H2O(SecondStage):
    """Half of the budget goes to the newest tokens, half to the heavy hitters, as in the paper."""

    compares: ClassVar[Literal["no", "heads", "layers"]] = "heads"

    recent: int | float = 0.5

    @property
    def observes(self) -> int | None:
        return None

    @property
    def decay(self) -> float | None:
        return 1.0

    def score(self, candidates: Candidates) -> Tensor:
        assert candidates.attention is not None
        return candidates.scores + candidates.attention
