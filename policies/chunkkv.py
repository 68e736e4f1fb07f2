"""ChunkKV: keep whole chunks of the text, those that the last queries attend to (arXiv:2502.00299).

    score[j] = mean over heads, and over tokens t of j's chunk, of attention[t],
    attention[t] = sum over the last `window` queries i of softmax(q_i . k)[t]

A chunk is `chunk` consecutive tokens, counted from the beginning of the sequence. Words that belong together stay
together, and all heads of a layer keep the same ones. The window's own tokens are kept whatever they score, and belong
to no chunk. Where the budget ends within a chunk, that chunk is cut.

The paper also has layers reuse the choice of the layer before; here each makes its own.

As with SnapKV, the window slides while decoding: scores fade, and the attention of a single query is each token's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.policies.method import register
from kvcompress.policies.policy import Candidates
from kvcompress.policies.snapkv import ObservationWindow


@register(
    "chunkkv",
    "chunks of text, all but the last one whole, by SnapKV's sums",
    costs="sums of the last 32 queries",
    paper="2502.00299",
    tried={"window": (3, 1, 8), "recent": (3,), "chunk": (4, 1, 3, 10)},
)
@dataclass(frozen=True, kw_only=True)
class ChunkKV(ObservationWindow):
    """The paper's chunks of 10 tokens.

    chunk: tokens that stay or go together.
    """

    chunk: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")

    def _pool(self, candidates: Candidates) -> Tensor:
        attention, positions = candidates.attention, candidates.positions
        assert attention is not None
        before = (positions >= 0) & (positions < (candidates.lengths - self.window)[:, None, None])
        chunks = (positions.clamp(min=0) // self.chunk).long().flatten(1)
        number = int(chunks.max()) + 1
        total, tokens = (
            torch.zeros(len(chunks), number, device=chunks.device).scatter_add_(1, chunks, part.flatten(1))
            for part in (attention.masked_fill(~before, 0.0), before.float())
        )
        mean = total / tokens.clamp(min=1.0)
        if candidates.mean_over_ranks is not None:
            mean = candidates.mean_over_ranks(mean)
        return torch.where(before, mean.gather(1, chunks).view_as(attention), attention)
