"""H2O replayed in float64 by plain loops, from the queries, keys and values that went through a cache.

One sequence, one KV head, one token list at a time; nothing is shared with the package.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """One forward in one layer: what came in, and what the cache held after it."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    out: Tensor
    positions: Tensor
    scores: Tensor


def record(cache: Any) -> list[list[Step]]:
    """Writes down every forward through the layers of an evicting cache: a list of steps for each layer."""
    steps: list[list[Step]] = [[] for _ in cache.layers]
    for layer, seen in zip(cache.layers, steps, strict=True):
        inner = layer._attend

        def attend(chunk: Any, layer: Any = layer, seen: list[Step] = seen, inner: Any = inner) -> Tensor:
            out = inner(chunk)
            slots = layer.slots
            tensors = (chunk.query, chunk.key, chunk.value, chunk.visible, out, slots.positions, slots.scores)
            seen.append(Step(*(None if tensor is None else tensor.clone() for tensor in tensors)))
            return out

        layer._attend = attend
    return steps


@dataclass
class Held:
    """A token as the replay holds it."""

    position: int
    key: Tensor
    value: Tensor
    score: float = 0.0


@dataclass
class Replay:
    """The greedy algorithm for one sequence and one KV head."""

    budget: int
    recent: int
    sinks: int = 0
    window: int | None = None
    scale: float = 1.0
    held: list[Held] = field(default_factory=list)
    length: int = 0

    def feed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [group, tokens, head_dim], key and value [tokens, head_dim], no padding. The output, as query."""
        query, key, value = query.double(), key.double(), value.double()
        group, tokens, _ = query.shape
        fresh = [Held(self.length + index, key[index], value[index]) for index in range(tokens)]
        everyone = self.held + fresh
        keys = torch.stack([token.key for token in everyone])
        values = torch.stack([token.value for token in everyone])
        out = torch.zeros(group, tokens, value.shape[-1], dtype=torch.float64)
        for index in range(tokens):
            at = self.length + index
            for head in range(group):
                logits = self.scale * keys @ query[head, index]
                for place, token in enumerate(everyone):
                    if token.position > at or (self.window is not None and token.position <= at - self.window):
                        logits[place] = -torch.inf
                probabilities = logits.softmax(0)
                out[head, index] = probabilities @ values
                for place, token in enumerate(everyone):
                    token.score += float(probabilities[place])
        self.length += tokens
        self.held = everyone
        self._evict(whole=tokens > 1)
        return out

    def _evict(self, whole: bool) -> None:
        """Down to the budget; after a chunk, what has left the window goes too."""
        budget = self.budget if self.window is None else min(self.budget, self.window)

        def unseen(token: Held) -> bool:
            return self.window is not None and token.position <= self.length - self.window

        def worth(token: Held) -> tuple[float, int]:
            if unseen(token):
                return -2.0, token.position
            if token.position >= self.length - self.recent or token.position < self.sinks:
                return float("inf"), token.position
            return token.score, token.position

        if whole:
            self.held = [token for token in self.held if not unseen(token)]
        while len(self.held) > budget:
            self.held.remove(min(self.held, key=worth))
        self.held.sort(key=lambda token: token.position)
