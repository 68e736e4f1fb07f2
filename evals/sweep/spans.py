"""How much of each part of a prompt an evicting cache has kept."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# a part's name, its first token, and the one after its last
Span = tuple[str, int, int]


def prompt_spans(template: int, instruction: int, context: int, question: int) -> tuple[Span, ...]:
    """The parts of a prompt, without those that have no token.

    Args:
        template: how many tokens the chat template puts first. instruction: where the instruction ends. context: where
            the context ends, which is divided into thirds. question: where the question ends.
    """
    third = (context - instruction) / 3
    ends = {
        "template": template,
        "instruction": instruction,
        "first_third": instruction + round(third),
        "middle_third": instruction + round(2 * third),
        "last_third": context,
        "question": question,
    }
    starts = [0, *ends.values()]
    return tuple((name, start, end) for (name, end), start in zip(ends.items(), starts, strict=False) if start < end)


def kept_by_span(cache: Any, spans: Sequence[Sequence[Span]], read: Sequence[int]) -> dict[str, float] | None:
    """The share of each span's tokens that a cache holds, averaged over layers, KV heads and sequences.

    Args:
        spans: of each sequence. read: how many tokens of it the cache has read; a span ends there.

    Returns:
        Shares by the spans' names, or None for a cache that does not say which tokens it holds.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "held_positions") and layer.segments()]
    shares: dict[str, list[float]] = {}
    for layer in layers:
        # [batch, kv_heads, any], less than 0 where a slot is empty
        for held, own, tokens in zip(layer.held_positions().cpu(), spans, read, strict=True):
            for name, start, stop in own:
                if start < min(stop, tokens):
                    shares.setdefault(name, []).append(_share(held, start, min(stop, tokens)))
    return {name: sum(values) / len(values) for name, values in shares.items()} if layers else None


def _share(held: Tensor, start: int, stop: int) -> float:
    inside = (held >= start) & (held < stop)
    return float(inside.sum(-1).float().mean()) / (stop - start)
