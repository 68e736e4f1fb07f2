"""Which tokens an evicting cache holds after each forward."""

import itertools
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.evicting import EvictingCache
from kvcompress.check.outcome import Fault


class HeldTokens:
    """Which tokens an evicting cache holds after each forward."""

    def __init__(self, cache: Any) -> None:
        self._follows = isinstance(cache, EvictingCache)
        # the columns fed, and for each layer the positions of the tokens held, [batch, kv_heads, any], -1 for none
        self.forwards: list[tuple[int, list[Tensor]]] = []

    def note(self, cache: Any, stop: int) -> None:
        if self._follows:
            self.forwards.append(
                (stop, [cache.layers[index].held_positions().clone().long() for index in cache.attending])
            )

    def allowed(self, row: int, pads: int, tokens: int) -> list[Tensor]:
        """For each layer, whether a token (last dimension) was held when another was fed: [kv_heads, tokens, tokens]
        bool."""
        layers = []
        for layer in range(len(self.forwards[0][1])):
            kv_heads = self.forwards[0][1][layer].shape[1]
            allowed = torch.ones(kv_heads, tokens, tokens, dtype=torch.bool)
            for (start, held), (stop, _) in itertools.pairwise(self.forwards):
                past, places = start - pads, held[layer][row].cpu()
                if bool((places >= past).any()):
                    raise Fault(f"layer {layer} holds a token at place {int(places.max())} of {past} that were fed")
                there = torch.zeros(kv_heads, past + 1, dtype=torch.bool)
                # an empty slot points past the end
                there.scatter_(1, places.masked_fill(places < 0, past), True)
                allowed[:, past : stop - pads, :past] = there[:, None, :past]
            layers.append(allowed)
        return layers


def overlap(held: Tensor, wanted: Tensor) -> float:
    """The share of the tokens wanted, [kv_heads, slots], -1 for none, that is held."""
    pairs = zip(held.tolist(), wanted.tolist(), strict=True)
    sets = [({*one} - {-1}, {*other} - {-1}) for one, other in pairs]
    return sum(len(one & other) for one, other in sets) / max(1, sum(len(other) for _, other in sets))
