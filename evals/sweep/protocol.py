"""How a cache is questioned: it reads the context, compresses, and must answer with what is left.

A cache compresses at the end of each forward, so the tokens of one forward are read in full. Scoring in one forward
would measure nothing, and the first token after a prompt always comes from uncompressed logits. Therefore a prompt is
read in two forwards, and every generated token comes from the compressed cache:

    question-agnostic   context | question        the method does not know what will be asked
    question-aware      context, question | end   it does; the last `hold_back` tokens of the question are read after

Memory is measured between the two. The tokens of the second forward see one another in full.

Two more protocols ask several questions of one context, as SCBench does (arXiv:2412.10319):

    multi-turn      context, question | end, then one question after another, in one conversation
    multi-request   context | each question, of a copy of the cache that was compressed once

In multi-turn a cache knows the first question when it compresses, and must answer the others with what that left; each
answer stays in the conversation. Conversations are read side by side: one whose answer has ended reads nothing until
the next question, behind columns that are hidden from it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.evals.sweep.samples import Prompt
from kvcompress.evals.sweep.spans import kept_by_span
from kvcompress.hf import cache_argument

AGNOSTIC, AWARE = PROTOCOLS = ("question-agnostic", "question-aware")
# of several questions about one context
MULTI_TURN, MULTI_REQUEST = SEVERAL = ("multi-turn", "multi-request")

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
    forward after the question came. kept_by_span: the share kept of each part of the prompts (spans.py), None if the
    cache does not say.
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
    kept_by_span: dict[str, float] | None = None

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
            kept_by_span=cls._mean_spans(parts),
        )

    @staticmethod
    def _mean_spans(parts: Sequence["Measured"]) -> dict[str, float] | None:
        """The average share of each span, of the batches that have it."""
        weighted: dict[str, list[tuple[float, int]]] = {}
        for part in parts:
            for name, share in (part.kept_by_span or {}).items():
                weighted.setdefault(name, []).append((share, part.sequences))
        means = {
            name: sum(share * count for share, count in each) / sum(count for _, count in each)
            for name, each in weighted.items()
        }
        return means or None


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

    def fork(self) -> "Reader":
        """A reader that continues from here with a copy of the cache."""
        clone = getattr(self.cache, "clone", None)
        other = Reader(self.model, copy.deepcopy(self.cache) if clone is None else clone(), self.pad)
        other.mask = self.mask
        return other

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
    if protocol in (AGNOSTIC, MULTI_REQUEST):
        return prompt.context, prompt.question
    if protocol not in (AWARE, MULTI_TURN):
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS + SEVERAL)}, got {protocol!r}")
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
    reader, asked, measured = _compress(model, make_cache, prompts, protocol, hold_back, must_keep_at_most, first)
    answers, _ = _decode(reader, asked, [prompt.max_new_tokens for prompt in prompts], stops)
    return answers, _with_fetches(measured, reader)


def answer_several(
    model: PreTrainedModel,
    make_cache: MakeCache,
    prompts: Sequence[Prompt],
    protocol: str,
    *,
    hold_back: int = 1,
    stops: frozenset[int] = frozenset(),
    must_keep_at_most: int | None = None,
    first: Callable[["Reader"], None] | None = None,
) -> tuple[list[list[list[int]]], Measured]:
    """As `answer`, to every question of each prompt, under one of SEVERAL: for each prompt, an answer per question.

    Raises:
        ValueError: another protocol, or prompts with different numbers of questions.
    """
    if protocol not in SEVERAL:
        raise ValueError(f"protocol must be one of {', '.join(SEVERAL)}, got {protocol!r}")
    counts = {1 + len(prompt.more) for prompt in prompts}
    if len(counts) > 1:
        raise ValueError(
            f"prompts of one batch must have as many questions each; got {len(prompts)} prompts with "
            f"{', '.join(map(str, sorted(counts)))} questions"
        )
    reader, asked, measured = _compress(model, make_cache, prompts, protocol, hold_back, must_keep_at_most, first)
    ask = _converse if protocol == MULTI_TURN else _request
    answers, last = ask(reader, prompts, asked, stops)
    return answers, _with_fetches(measured, last)


def _converse(
    reader: Reader, prompts: Sequence[Prompt], begun: list[tuple[int, ...]], stops: frozenset[int]
) -> tuple[list[list[list[int]]], Reader]:
    """The answers of each conversation, and the reader."""
    said, unread = _decode(reader, begun, [prompt.max_new_tokens for prompt in prompts], stops, goes_on=True)
    answers = [[own] for own in said]
    for turns in zip(*(prompt.more for prompt in prompts), strict=True):
        rows = [(*left, *turn.following) for left, turn in zip(unread, turns, strict=True)]
        said, unread = _decode(reader, rows, [turn.max_new_tokens for turn in turns], stops, goes_on=True)
        for each, own in zip(answers, said, strict=True):
            each.append(own)
    return answers, reader


def _request(
    reader: Reader, prompts: Sequence[Prompt], begun: list[tuple[int, ...]], stops: frozenset[int]
) -> tuple[list[list[list[int]]], Reader]:
    """The answers to each question alone, and the reader that was asked last."""
    rounds = [(begun, [prompt.max_new_tokens for prompt in prompts])]
    for turns in zip(*(prompt.more for prompt in prompts), strict=True):
        rounds.append(([turn.alone for turn in turns], [turn.max_new_tokens for turn in turns]))
    found = []
    for number, (asked, limits) in enumerate(rounds, 1):
        fork = reader if number == len(rounds) else reader.fork()
        found.append(_decode(fork, asked, limits, stops)[0])
    return [list(answers) for answers in zip(*found, strict=True)], reader


def force(
    model: PreTrainedModel,
    make_cache: MakeCache,
    prompts: Sequence[Prompt],
    given: Sequence[Sequence[int]],
    protocol: str,
    *,
    hold_back: int = 1,
    must_keep_at_most: int | None = None,
    first: Callable[["Reader"], None] | None = None,
) -> tuple[list[list[int]], Measured]:
    """As `answer`, but each answer is given, and fed one token at a time: what the model would have chosen instead of
    each of its tokens."""
    reader, asked, measured = _compress(model, make_cache, prompts, protocol, hold_back, must_keep_at_most, first)
    logits = reader.read(asked)
    predicted: list[list[int]] = [[] for _ in prompts]
    longest = max(map(len, given))
    for place in range(longest):
        chosen = logits[:, -1].argmax(-1).tolist()
        for row, tokens in enumerate(given):
            if place < len(tokens):
                predicted[row].append(chosen[row])
        if place + 1 < longest:
            # an answer that has ended goes on with whatever is chosen
            logits = reader.read(
                [[tokens[place] if place < len(tokens) else chosen[row]] for row, tokens in enumerate(given)]
            )
    return predicted, _with_fetches(measured, reader)


def _compress(
    model: PreTrainedModel,
    make_cache: MakeCache,
    prompts: Sequence[Prompt],
    protocol: str,
    hold_back: int,
    must_keep_at_most: int | None,
    first: Callable[[Reader], None] | None,
) -> tuple[Reader, list[tuple[int, ...]], Measured]:
    """Reads what comes before compression, and proves it; the tokens to read next are the second result."""
    parts = [split(prompt, protocol, hold_back) for prompt in prompts]
    rows = [context for context, _ in parts]
    reader = Reader(model, make_cache())
    if first is None:
        reader.read(rows)
    else:
        first(reader)
    measured = reader.measure()
    if must_keep_at_most is not None:
        prove_compression(measured, must_keep_at_most)
    spans = kept_by_span(reader.cache, [prompt.spans for prompt in prompts], [len(row) for row in rows])
    return reader, [last for _, last in parts], dataclasses.replace(measured, kept_by_span=spans)


def _decode(
    reader: Reader,
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    stops: frozenset[int],
    goes_on: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy answers after these tokens, up to a stop token or a limit each, and the tokens of them that the cache has
    not read.

    Args:
        goes_on: a row whose answer has ended reads no more, as it will be asked again; else it reads what is chosen.
    """
    answers: list[list[int]] = [[] for _ in rows]
    unread: list[list[int]] = [[] for _ in rows]
    stopped = [False] * len(rows)
    logits = reader.read(rows)
    while True:
        chosen = logits[:, -1].argmax(-1).tolist()
        for row, token in enumerate(chosen):
            stopped[row] = stopped[row] or token in stops
            if not stopped[row]:
                answers[row].append(token)
                stopped[row] = len(answers[row]) >= limits[row]
                unread[row] = [token] if stopped[row] else []
        if all(stopped):
            return answers, unread
        logits = reader.read([[] if goes_on and stopped[row] else [token] for row, token in enumerate(chosen)])


def _with_fetches(measured: Measured, reader: Reader) -> Measured:
    """With what was moved to the device since."""
    fetched = reader.cache.memory().fetched_per_forward / measured.sequences
    return dataclasses.replace(measured, fetched_bytes=fetched)


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
