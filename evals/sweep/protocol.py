"""How a cache is questioned: it reads the context, compresses, and must answer with what is left.

A cache compresses at the end of each forward, so the tokens of one forward are read in full. Scoring in one forward
would measure nothing, and the first token after a prompt always comes from uncompressed logits. Therefore a prompt is
read in two forwards, and every generated token comes from the compressed cache:

    question-agnostic   context | question        the method does not know what will be asked
    question-aware      context, question | end   it does; the last `hold_back` tokens of the question are read after

Memory is measured between the two. The tokens of the second forward see one another in full.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.evals.sweep.samples import Prompt
from kvcompress.hf import cache_argument

AGNOSTIC, AWARE = PROTOCOLS = ("question-agnostic", "question-aware")

# builds an empty cache: any transformers cache that has kvcompress's memory()
MakeCache = Callable[[], Any]


class NotCompressedError(RuntimeError):
    """A cache that should have compressed did not, so its score would mean nothing."""


@dataclass(frozen=True)
class Measured:
    """What a cache held when the question came, as an average per sequence.

    bytes_held: of all live storages; host_bytes of them are off the model's device on purpose, in host memory or files.
    full_bytes: of the full cache, without padding. tokens_seen: real tokens. tokens_kept: mean over layers and KV
    heads; least_kept and most_kept: over these and the sequences. fetched_bytes: average moved to the device per
    forward after the question came.
    """

    sequences: int
    bytes_held: float
    full_bytes: float
    by_component: dict[str, float]
    tokens_seen: float
    tokens_kept: float
    least_kept: int
    most_kept: int
    host_bytes: float = 0.0
    fetched_bytes: float = 0.0

    @property
    def device_bytes(self) -> float:
        """Bytes held where the model computes."""
        return self.bytes_held - self.host_bytes

    @property
    def ratio(self) -> float:
        """Bytes held over those of the full cache."""
        return self.bytes_held / self.full_bytes

    def facts(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; `Measured(**facts)` is the same again."""
        return dataclasses.asdict(self)

    @classmethod
    def mean(cls, parts: Sequence["Measured"]) -> "Measured":
        """The average per sequence over several batches, weighted by their sequences."""
        count = sum(part.sequences for part in parts)

        def mean(values: Iterable[float]) -> float:
            return sum(value * part.sequences for value, part in zip(values, parts, strict=True)) / count

        components = dict.fromkeys(name for part in parts for name in part.by_component)
        return cls(
            sequences=count,
            by_component={name: mean(part.by_component.get(name, 0.0) for part in parts) for name in components},
            least_kept=min(part.least_kept for part in parts),
            most_kept=max(part.most_kept for part in parts),
            **{name: mean(getattr(part, name) for part in parts) for name in _MEANS},
        )


# the fields of Measured that are averaged over batches
_MEANS = ("bytes_held", "full_bytes", "tokens_seen", "tokens_kept", "host_bytes", "fetched_bytes")


class Reader:
    """Feeds batches of token rows to a model through one cache, padded on the left."""

    def __init__(self, model: PreTrainedModel, cache: Any, pad: int = 0) -> None:
        self.model = model
        self.cache = cache
        self.pad = pad
        self.mask: Tensor | None = None

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]], logits: int = 1) -> Tensor:
        """One forward over these tokens, [batch, logits, vocabulary] for the last of them."""
        tokens, fresh = self.columns(rows)
        self.mask = fresh if self.mask is None else torch.cat([self.mask, fresh], 1)
        # positions in each token's own sequence, pads not counted
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        mask = None if bool(self.mask.all()) else self.mask
        return self.model(
            tokens,
            attention_mask=mask,
            position_ids=places,
            **cache_argument(self.model, self.cache),
            logits_to_keep=logits,
        ).logits

    def columns(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The tokens as the model is fed them, and which of them are real, both [batch, columns] int64."""
        width = max(len(row) for row in rows)
        device = self.model.device
        tokens = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in rows], device=device)
        return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)

    def measure(self) -> Measured:
        """What the cache holds now, per sequence."""
        assert self.mask is not None
        report = self.cache.memory()
        batch, width = self.mask.shape
        kept = torch.stack([layer.float() for layer in report.tokens_kept])
        seen = int(self.mask.sum())
        return Measured(
            sequences=batch,
            bytes_held=report.total_bytes / batch,
            full_bytes=report.full_bytes * seen / (batch * width) / batch,
            by_component={name: size / batch for name, size in report.by_component.items()},
            tokens_seen=seen / batch,
            tokens_kept=float(kept.mean()),
            least_kept=int(kept.min()),
            most_kept=int(kept.max()),
            host_bytes=sum(report.offloaded.values()) / batch,
        )


def split(prompt: Prompt, protocol: str, hold_back: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the cache compresses, and those read after that.

    Raises:
        ValueError: an unknown protocol, or a hold-back that leaves nothing to read before or after.
    """
    if protocol == AGNOSTIC:
        return prompt.context, prompt.question
    if protocol != AWARE:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not 1 <= hold_back <= len(prompt.question):
        raise ValueError(
            "hold_back must be at least 1 token, or the first answer token would come from uncompressed logits, "
            f"and at most the question's {len(prompt.question)}; got {hold_back}"
        )
    whole = prompt.context + prompt.question
    return whole[:-hold_back], whole[-hold_back:]


def answer(
    model: PreTrainedModel,
    make_cache: MakeCache,
    prompts: Sequence[Prompt],
    protocol: str,
    *,
    hold_back: int = 1,
    stops: frozenset[int] = frozenset(),
    must_keep_at_most: int | None = None,
    first: Callable[["Reader"], None] | None = None,
) -> tuple[list[list[int]], Measured]:
    """Greedy answers to a batch of prompts through a new cache, up to a stop token, and what it held.

    Args:
        first: does the first forward; by default the model does.
        must_keep_at_most: how many tokens a head may keep on average, if the cache must compress.

    Raises:
        NotCompressedError: it kept more, or held no fewer bytes than the full cache.
    """
    parts = [split(prompt, protocol, hold_back) for prompt in prompts]
    reader = Reader(model, make_cache())
    if first is None:
        reader.read([context for context, _ in parts])
    else:
        first(reader)
    measured = reader.measure()
    if must_keep_at_most is not None:
        prove_compression(measured, must_keep_at_most)

    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    logits = reader.read([last for _, last in parts])
    while True:
        chosen = logits[:, -1].argmax(-1).tolist()
        for row, token in enumerate(chosen):
            stopped[row] = stopped[row] or token in stops
            if not stopped[row]:
                answers[row].append(token)
                stopped[row] = len(answers[row]) >= prompts[row].max_new_tokens
        if all(stopped):
            fetched = reader.cache.memory().fetched_per_forward / len(prompts)
            return answers, dataclasses.replace(measured, fetched_bytes=fetched)
        logits = reader.read([[token] for token in chosen])


def prove_compression(measured: Measured, budget: int) -> None:
    """Raises NotCompressedError unless the cache keeps to its budget and holds fewer bytes than the full cache.

    For a cache that keeps tokens off the device, the budget is what it reads; it must hold fewer bytes on the device.
    """
    # layers of unequal budgets are rounded one by one
    over = measured.tokens_kept > budget + 1 and not measured.host_bytes
    if over or measured.device_bytes >= measured.full_bytes:
        raise NotCompressedError(
            f"with a budget of {budget} tokens the cache kept {measured.tokens_kept:.1f} of {measured.tokens_seen:.1f} "
            f"tokens in {measured.bytes_held:.0f} bytes, where the full cache has {measured.full_bytes:.0f}"
        )
