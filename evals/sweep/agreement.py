"""How much a compressed cache changes the model on plain text: KL, top-1 token, perplexity, attention outputs.

    KL = mean over scored tokens of sum_v p_full(v) (log p_full(v) - log p(v))

The context is read, the cache compresses, and the tokens that follow are scored with what is left, while the full cache
reads the same tokens. The context's last token is held back, so that no scored logit is uncompressed. What follows is
read `chunk` tokens per forward: a chunk's tokens see one another in full, and the cache evicts after each chunk. 1 is
what generation does; more is faster and easier on the method. Logits are kept for one chunk only.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress.evals.outputs import AttentionOutputs, relative_errors
from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.protocol import MakeCache, Measured, Reader, prove_compression


@dataclass(frozen=True)
class Agreement:
    """Means over the scored tokens, one entry per window of text; attention_error: a list with an entry per layer."""

    top1: list[float]
    kl: list[float]
    loss: list[float]
    full_loss: list[float]
    attention_error: list[list[float]]


def make_windows(tokens: Sequence[int], context: int, continuation: int, windows: int) -> list[list[int]]:
    """Windows of context + continuation tokens, spread evenly over a text.

    Raises:
        ValueError: the text is too short.
    """
    width = context + continuation
    if context < 2 or continuation < 1 or windows < 1:
        raise ValueError(
            "text needs a context of at least 2 tokens, a continuation of at least 1 and at least 1 window; "
            f"got {context}, {continuation} and {windows}"
        )
    if len(tokens) < width * windows:
        raise ValueError(
            f"text must hold {windows} windows of {context} + {continuation} = {width} tokens, got {len(tokens)} tokens"
        )
    step = (len(tokens) - width) // max(1, windows - 1)
    return [list(tokens[step * index : step * index + width]) for index in range(windows)]


class FullReference:
    """The full cache on these windows: read once, continued along with each compressed cache. It stays in memory."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[Sequence[int]], context: int) -> None:
        self.model = model
        self.windows = windows
        self.context = context
        rows = [window[: context - 1] for window in windows]
        self._cache = DynamicCache(config=model.config)
        # the recorded first forward of most caches, and of this one
        self._first: FirstForward | None = None
        if len(rows) <= FirstForward.most_rows(model, context):
            self._first = FirstForward(model, rows)
            self._first.store(self._cache)
        else:
            Reader(model, self._cache).read(rows)

    def compare(
        self, make_cache: MakeCache, *, chunk: int = 1, must_keep_at_most: int | None = None
    ) -> tuple[Agreement, Measured]:
        """Scores the continuations through a new cache.

        Args:
            chunk: tokens per forward.
            must_keep_at_most: as in `answer`.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        start = self.context - 1
        reader = Reader(self.model, make_cache())
        if self._first is not None and FirstForward.serves(reader.cache):
            self._first.fill(reader)
        else:
            reader.read([window[:start] for window in self.windows])
        measured = reader.measure()
        if must_keep_at_most is not None:
            prove_compression(measured, must_keep_at_most)

        full = Reader(self.model, copy.deepcopy(self._cache))
        full.mask = reader.mask
        sums = torch.zeros(4, len(self.windows), dtype=torch.float64, device=self.model.device)
        errors: Tensor | None = None
        scored = len(self.windows[0]) - self.context
        for first in range(start, start + scored, chunk):
            last = min(first + chunk, start + scored)
            following = [window[first:last] for window in self.windows]
            targets = torch.tensor([window[first + 1 : last + 1] for window in self.windows], device=self.model.device)
            with AttentionOutputs(self.model) as outputs:
                logits, found = reader.read(following, last - first), outputs.take()
                full_logits, expected = full.read(following, last - first), outputs.take()
            sums += distances(logits, full_logits, targets)
            part = relative_errors(found, expected)
            errors = part if errors is None else errors + part
        assert errors is not None
        top1, kl, loss, full_loss = (sums / scored).tolist()
        return Agreement(top1, kl, loss, full_loss, (errors.T / scored).tolist()), measured


def distances(logits: Tensor, full_logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over the tokens of agreement, KL, loss and the full cache's loss, [4, batch].

    Both logits are [batch, tokens, vocabulary].
    """
    log_p, log_full = logits.float().log_softmax(-1), full_logits.float().log_softmax(-1)
    top1 = (log_p.argmax(-1) == log_full.argmax(-1)).float()
    kl = (log_full.exp() * (log_full - log_p)).sum(-1).clamp(min=0)
    loss, full_loss = (-log.gather(-1, targets[..., None])[..., 0] for log in (log_p, log_full))
    return torch.stack([values.double().sum(-1) for values in (top1, kl, loss, full_loss)])
