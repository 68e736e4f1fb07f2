"""Knorm: keep the keys of small norm, which tend to draw attention (arXiv:2406.11430).

score[j] = -|k_j|

The paper leaves the first two layers whole; here every layer has its budget.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy


@register("knorm", "keys of small norm", costs="nothing", paper="2406.11430")
@dataclass(frozen=True, kw_only=True)
class Knorm(Policy):
    """No settings of its own; a token's score never changes.

    A quarter of the budget goes to the newest tokens, where the paper keeps one: otherwise a question is evicted while
    it is being answered (needle at 1k tokens, budget 20 %: 0.2 of the answers are right, 1.0 with the quarter).
    """

    recent: int | float = 0.25
    static: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> Tensor:
        norms: Tensor = candidates.keys.float().norm(dim=-1)
        return -norms
