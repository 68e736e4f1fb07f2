"""StreamingLLM: keep the first tokens, where attention collects, and the newest (arXiv:2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy


@register(
    "streaming",
    "sinks + recent",
    costs="nothing: the floor",
    paper="2309.17453",
    label="StreamingLLMCache",
    aliases=("streaming_llm",),
    tried={"sinks": (2,)},
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """The paper's four sinks; all the rest of the budget is the recent window."""

    sinks: int = 4
    static: ClassVar[bool] = True
    chooses: ClassVar[bool] = False

    def score(self, candidates: Candidates) -> Tensor:
        return candidates.positions.float()
