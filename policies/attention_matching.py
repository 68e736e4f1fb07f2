"""Attention Matching: few tokens that attend and answer as all did (arXiv:2602.16284).

    score[j] = sum over queries i of the second reading, and over the heads of j's group, of softmax(q_i . k)[j]**2

The softmax is over the text's tokens alone, so that its root mean square ranks them. What is kept is then fitted to the
same queries (caches/matching.py): a log-weight for each token, so that those kept have the attention mass of all, and
values, so that they have its output.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy, SecondReading


@register(
    "attention_matching",
    "as `kvzip`, with weights and values fitted so that what is kept answers for all",
    costs="a second prefill, and a fit for each head",
    paper="2602.16284",
    label="AttentionMatchingCache",
    aliases=("am",),
    tried={"sinks": (1,), "chunk": (7, 1, 3, 10, 100), "prompt": ((5, 6), ()), "queries": (4, 1, 100)},
)
@dataclass(frozen=True, kw_only=True)
class AttentionMatching(Policy):
    """Budgets are shared by all heads of all layers; what is decoded stays until several tokens are fed again.

    chunk: tokens of the context read again at a time, and fitted together.
    prompt: token ids fed before each chunk of the second reading.
    queries: tokens of a chunk whose queries the fit looks at, evenly spread.
    """

    compares: ClassVar[Literal["no", "heads", "layers"]] = "layers"
    allocates: ClassVar[Literal["uniform", "pyramid", "heads", "global"]] = "global"

    sinks: int = 4
    chunk: int = 2048
    prompt: tuple[int, ...] = ()
    queries: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 token, got {getattr(self, name)}")

    @property
    def observes(self) -> int | None:
        # nothing in the first reading, but the layer needs to know which columns there are
        return 1

    @property
    def rereads(self) -> SecondReading | None:
        return SecondReading(
            chunk=self.chunk, prompt=self.prompt, keeps_answers=True, records="squares", fits=self.queries
        )

    def score(self, candidates: Candidates) -> Tensor:
        attention, visible = candidates.attention, candidates.visible
        assert attention is not None
        if visible is None:
            return candidates.scores + attention if candidates.tokens_fed > 1 else candidates.scores
        # a row fed one token has read nothing again
        return candidates.scores + torch.where(visible.sum(-1)[:, None, None] > 1, attention, 0.0)
