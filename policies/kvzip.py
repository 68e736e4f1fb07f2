"""KVzip: keep what is needed to repeat the context (arXiv:2505.23416).

    score[j] = max over queries i of the second reading, and over the heads of j's group, of softmax(q_i . k)[j]

The context is fed once more, after itself: what a model looks up to repeat a text is what any question about the text
may need, so the choice serves all questions, even those not asked yet. It costs a second prefill.

The paper writes "Repeat the previous context exactly." before each chunk (`prompt`); on SmolLM2-135M the bare text does
as well. It compares all heads of all layers, and so does a cache unless its `allocation` says otherwise.

What is decoded afterwards stays, on top of the budget, until several tokens are fed again. With `keeps_answers=False`
it competes at once: a token keeps the highest score it ever had, and the newest query adds its attention, averaged over
the heads of a group; few queries have then seen what is decoded, and all of them what was read.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, SecondReading
from kvcompress.policies.second_stage import SecondStage


@register(
    "kvzip",
    "what is looked up to say the context again: for questions not asked yet",
    costs="a second prefill",
    paper="2505.23416",
    label="KVzipCache",
    tried={
        "sinks": (1,),
        "chunk": (7, 1, 3, 10, 100),
        "prompt": ((5, 6), ()),
        "keeps_answers": (False, True),
        "second_stage": (0.0, 1.0),
    },
)
@dataclass(frozen=True, kw_only=True)
class KVzip(SecondStage):
    """The paper's chunks of 2048 tokens, without its prompt.

    chunk: tokens of the context read again at a time.
    prompt: token ids fed before each chunk of the second reading.
    keeps_answers: what is decoded stays until several tokens are fed again.
    """

    compares: ClassVar[Literal["no", "heads", "layers"]] = "layers"
    allocates: ClassVar[Literal["uniform", "pyramid", "heads", "global"]] = "global"

    sinks: int = 4
    chunk: int = 2048
    prompt: tuple[int, ...] = ()
    keeps_answers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")

    @property
    def observes(self) -> int | None:
        # seen in the first reading
        return 1

    @property
    def rereads(self) -> SecondReading | None:
        return SecondReading(chunk=self.chunk, prompt=self.prompt, keeps_answers=self.keeps_answers)

    def score(self, candidates: Candidates) -> Tensor:
        attention, visible = candidates.attention, candidates.visible
        assert attention is not None
        mean = attention * (candidates.positions.shape[1] / candidates.query.shape[1])
        if visible is None:
            return torch.maximum(candidates.scores, attention if candidates.tokens_fed > 1 else mean)
        return torch.maximum(candidates.scores, torch.where(visible.sum(-1)[:, None, None] > 1, attention, mean))
