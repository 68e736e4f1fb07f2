"""SnapKV: keep what the last queries of the prompt attend to, in neighbourhoods (arXiv:2404.14469).

    score[j] = pool over neighbours of j of sum over the last `window` queries i of softmax(q_i . k)[j]

The window's own tokens are kept whatever they score, and add nothing to the scores of those before the window.

The paper compresses once, after the prompt. Here eviction goes on while decoding, so the observation window slides:
a forward of n < window queries adds its attention and what was observed before fades,
`score = (1 - n / window) * score + attention`, which remembers `window` queries. Without that, generated tokens could
never be judged against the prompt. The attention of a single query is not pooled.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates, Policy
from kvcompress.policies.second_stage import SecondStage


@dataclass(frozen=True, kw_only=True)
class ObservationWindow(Policy):
    """Scores by the attention of a forward's last queries, pooled as a subclass says.

    window: queries observed at the end of each forward.
    """

    recent: int | float = 32
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1 query, got {self.window}")

    @property
    def observes(self) -> int | None:
        return self.window

    @property
    def decay(self) -> float | None:
        return 1.0 - 1.0 / self.window

    def score(self, candidates: Candidates) -> Tensor:
        attention, visible = candidates.attention, candidates.visible
        assert attention is not None
        if visible is None:
            fade = max(0.0, 1.0 - candidates.tokens_fed / self.window)
            return fade * candidates.scores + (self._pool(candidates) if candidates.tokens_fed > 1 else attention)
        fresh = visible.sum(-1)[:, None, None]
        if candidates.tokens_fed > 1:
            attention = torch.where(fresh > 1, self._pool(candidates), attention)
        return (1.0 - fresh / self.window).clamp(min=0.0) * candidates.scores + attention

    def _pool(self, candidates: Candidates) -> Tensor:
        """The attention of several queries, [batch, kv_heads, candidates], as neighbours in the text share it."""
        raise NotImplementedError


@register(
    "snapkv",
    "what the last queries attend to, pooled",
    costs="sums of the last 32 queries",
    paper="2404.14469",
    label="SnapKVCache",
    tried={
        "window": (3, 1, 8),
        "recent": (3,),
        "kernel": (3, 1, 5),
        "pooling": ("avg", "max"),
        "second_stage": (0.0, 0.5),
    },
)
@dataclass(frozen=True, kw_only=True)
class SnapKV(ObservationWindow, SecondStage):
    """The defaults of the official code: 32 queries observed and kept, pooling over 5 tokens by average.

    Its experiments also use windows of 16 and 64, and pooling over 7 tokens by maximum (LongBench).

    kernel: tokens pooled together, an odd number; 1 for none.
    pooling: "avg" or "max".
    """

    compares: ClassVar[Literal["no", "heads", "layers"]] = "heads"

    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel}")

    def _pool(self, candidates: Candidates) -> Tensor:
        attention, positions = candidates.attention, candidates.positions
        assert attention is not None
        if self.kernel == 1:
            return attention
        within = positions >= (candidates.lengths - self.window)[:, None, None]
        # neighbours in the text: slots are in no order, and a missing token adds no attention
        order = positions.argsort(dim=-1, stable=True)
        in_order = attention.masked_fill(within | (positions < 0), 0.0).gather(-1, order)
        pool = torch.nn.functional.avg_pool1d if self.pooling == "avg" else torch.nn.functional.max_pool1d
        pooled = pool(in_order, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(within, attention, torch.empty_like(attention).scatter_(-1, order, pooled))
