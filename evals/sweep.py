"""Accuracy against memory: every method at every budget on every task, one result row a point.

Rows go to `results.jsonl` as soon as they are there, with what is needed to make them again; a sweep that was
interrupted takes up where it stopped. The full cache (ceiling) and sinks + recent tokens (floor) always take part.
A budget is resolved to tokens from the length asked for, so that all methods hold equally many, under both protocols.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress import registry
from kvcompress.evals.agreement import FullReference, make_windows
from kvcompress.evals.protocol import PROTOCOLS, Measured, answer, split
from kvcompress.evals.provenance import provenance
from kvcompress.evals.tasks import TASKS, Tokenizer, make_prompt, make_samples, read_text, score

TEXT = "text"
CONTINUATION = "continuation"
# part of every key: raise it whenever the same settings come to mean another measurement
_PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What to sweep.

    methods: specs of the registry. budgets: tokens (int), or fractions of the length (float; 1.0 keeps everything).
    tasks: of TASKS, or "text". lengths: context tokens. samples: prompts, or windows of text, a point.
    hold_back: tokens of the question read after compression, question-aware. batch: sequences at a time.
    text: a file for "text" and the essay haystacks. continuation, chunk: tokens scored, and read a forward, on text.
    """

    methods: tuple[str, ...]
    budgets: tuple[int | float, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    protocols: tuple[str, ...] = PROTOCOLS
    seed: int = 0
    hold_back: int = 1
    batch: int = 4
    text: str | None = None
    continuation: int = 64
    chunk: int = 1

    def __post_init__(self) -> None:
        for name, known in (("tasks", (*TASKS, TEXT)), ("protocols", PROTOCOLS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"unknown {name[:-1]} {value!r}; known: {', '.join(known)}")
        for name in ("methods", "budgets", "tasks", "lengths", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("samples", "batch", "hold_back", "continuation", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for length in self.lengths:
            if length < 2:
                raise ValueError(f"a length must be at least 2 tokens, got {length}")
        for budget in self.budgets:
            if not (0.0 < budget <= 1.0 if isinstance(budget, float) else budget >= 1):
                raise ValueError(
                    f"a budget must be a fraction in (0, 1] such as 0.2, or a count of tokens such as 512; got {budget}"
                )
        for method in self.methods:
            registry.parse(method)


@dataclass(frozen=True)
class Point:
    """One measurement. budget is None for what keeps every token: the full cache, and packed ones."""

    task: str
    length: int
    protocol: str
    method: str
    budget: int | float | None

    def budget_tokens(self, capacity: int) -> int | None:
        """The budget in tokens; a fraction of 1.0 is all that a sequence may grow to, `capacity`."""
        if self.budget is None:
            return None
        if isinstance(self.budget, int):
            return self.budget
        return capacity if self.budget == 1.0 else max(1, round(self.budget * self.length))

    @property
    def title(self) -> str:
        """For people."""
        budget = "" if self.budget is None else f" {self.budget}"
        return f"{self.task} {self.length} {self.protocol}: {self.method}{budget}"


def make_points(settings: Settings) -> list[Point]:
    """All points, those that share their prompts next to each other; ceiling and floor included."""
    methods = list(dict.fromkeys([*map(registry.canonical, settings.methods), registry.FLOOR]))
    points: list[Point] = []
    for task in dict.fromkeys(settings.tasks):
        for length in dict.fromkeys(settings.lengths):
            protocols = (CONTINUATION,) if task == TEXT else tuple(dict.fromkeys(settings.protocols))
            for protocol in protocols:
                points.append(Point(task, length, protocol, registry.FULL, None))
                for method in methods:
                    takes_budget = registry.parse(method)[0].takes_budget
                    budgets = list(dict.fromkeys(settings.budgets)) if takes_budget else [None]
                    if method != registry.FULL:
                        points += [Point(task, length, protocol, method, budget) for budget in budgets]
    return points


def check_budgets(model: PreTrainedModel, points: Iterable[Point]) -> None:
    """Builds each cache once, empty.

    Raises:
        ValueError: a method refuses its budget or its settings.
    """
    for method, tokens in dict.fromkeys((point.method, point.budget_tokens(2**20)) for point in points):
        try:
            registry.build(method, model, tokens)
        except ValueError as error:
            raise ValueError(f"{method} at a budget of {tokens} tokens: {error}") from None


class Results:
    """The rows of a folder. The newest row of a key stands."""

    def __init__(self, folder: Path, forget: bool = False) -> None:
        self.path = folder / "results.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        for row in () if forget else _read_rows(self.path):
            self.rows[row["key"]] = row

    def is_done(self, key: str) -> bool:
        """True where a row of this key succeeded."""
        return self.rows.get(key, {}).get("status") == "ok"

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, in one write that is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    # a line that was torn off stays by itself
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "key" in row:
                yield row


@dataclass
class Sweep:
    """A sweep of one model. `run` measures what is missing and returns the rows of all points, in their order.

    forget: measure again what the folder already has; its rows stay in the file, and newer ones stand.
    """

    settings: Settings
    model: PreTrainedModel
    tokenizer: Tokenizer
    folder: Path
    forget: bool = False
    build: Callable[[str, PreTrainedModel, int | None], Any] = registry.build

    def __post_init__(self) -> None:
        self.points = make_points(self.settings)
        self.results = Results(self.folder, self.forget)
        self._shared: tuple[Any, Any] = (None, None)

    def key(self, point: Point) -> str:
        """A hash of all that decides what the point measures."""
        return hashlib.sha256(json.dumps(self._facts(point), sort_keys=True).encode()).hexdigest()[:16]

    def missing(self) -> list[Point]:
        """Points without a row that succeeded."""
        return [point for point in self.points if not self.results.is_done(self.key(point))]

    def check_tasks(self) -> None:
        """Makes one sample of each task at each length.

        Raises:
            ValueError: a length cannot hold its task, or the hold-back is longer than a question.
        """
        settings = self.settings
        for task, length in dict.fromkeys((point.task, point.length) for point in self.points):
            if task == TEXT:
                self._windows(length)
                continue
            sample = make_samples(task, self.tokenizer, length, 1, seed=settings.seed, text=settings.text)[0]
            for protocol in settings.protocols:
                split(make_prompt(self.tokenizer, sample), protocol, settings.hold_back)

    @property
    def model_name(self) -> str:
        """As it was asked for."""
        return self.model.name_or_path or type(self.model).__name__

    def cost(self, point: Point) -> int:
        """Roughly how long a point takes, in tokens read."""
        settings = self.settings
        if point.task == TEXT:
            return settings.samples * (point.length + 40 * settings.continuation // settings.chunk)
        return settings.samples * (point.length + 400)

    def run(self, on_row: Callable[[Point, dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
        """Measures the missing points; one that fails is recorded as such and the rest goes on."""
        for point in self.missing():
            started = time.perf_counter()
            try:
                found = {"status": "ok"} | self.measure(point)
            except Exception as error:
                found = {
                    "status": "failed",
                    "error": f"{type(error).__name__}: {error}",
                    "traceback": traceback.format_exc(),
                }
            row = {"key": self.key(point)} | self._facts(point) | found
            row |= {"seconds": round(time.perf_counter() - started, 3), "provenance": self._provenance()}
            self.results.append(row)
            if on_row is not None:
                on_row(point, row)
        return [self.results.rows[self.key(point)] for point in self.points]

    def measure(self, point: Point) -> dict[str, Any]:
        """One point's score with its standard error, and its measured bytes."""
        return self._measure_text(point) if point.task == TEXT else self._measure_task(point)

    def _measure_task(self, point: Point) -> dict[str, Any]:
        settings, tokenizer = self.settings, self.tokenizer

        def prepare() -> Any:
            made = make_samples(
                point.task, tokenizer, point.length, settings.samples, seed=settings.seed, text=settings.text
            )
            return made, [make_prompt(tokenizer, sample) for sample in made]

        samples, prompts = self._share((point.task, point.length), prepare)
        capacity = max(len(p.context) + len(p.question) + p.max_new_tokens for p in prompts)
        budget = point.budget_tokens(capacity)
        # sequences of like length pad each other least
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].context))
        predictions = [""] * len(prompts)
        measured: list[Measured] = []
        for first in range(0, len(order), settings.batch):
            chosen = order[first : first + settings.batch]
            shortest = min(len(prompts[index].context) for index in chosen)
            answers, held = answer(
                self.model,
                lambda: self.build(point.method, self.model, budget),
                [prompts[index] for index in chosen],
                point.protocol,
                hold_back=settings.hold_back,
                stops=self._stops,
                must_keep_at_most=budget if budget is not None and budget < shortest else None,
            )
            measured.append(held)
            for index, tokens in zip(chosen, answers, strict=True):
                predictions[index] = tokenizer.decode(tokens, skip_special_tokens=True)
        scores = [score(sample, said) for sample, said in zip(samples, predictions, strict=True)]
        return (
            {"metric": "answers found", "score": _mean(scores), "stderr": _standard_error(scores)}
            | _held(measured, budget)
            | {
                "scores": scores,
                "depths": [round(sample.depth, 3) for sample in samples],
                "answers": [list(sample.answers) for sample in samples],
                "predictions": predictions,
            }
        )

    def _measure_text(self, point: Point) -> dict[str, Any]:
        settings = self.settings

        def prepare() -> list[FullReference]:
            windows = self._windows(point.length)
            batches = [windows[first : first + settings.batch] for first in range(0, len(windows), settings.batch)]
            return [FullReference(self.model, batch, point.length) for batch in batches]

        references = self._share((point.task, point.length), prepare)
        budget = point.budget_tokens(point.length + settings.continuation)
        measured: list[Measured] = []
        parts = []
        for reference in references:
            part, held = reference.compare(
                lambda: self.build(point.method, self.model, budget),
                chunk=settings.chunk,
                must_keep_at_most=budget if budget is not None and budget < point.length - 1 else None,
            )
            parts.append(part)
            measured.append(held)
        top1, kl, loss, full_loss = (
            [value for part in parts for value in getattr(part, name)] for name in ("top1", "kl", "loss", "full_loss")
        )
        return {
            "metric": "top-1 agreement",
            "score": _mean(top1),
            "stderr": _standard_error(top1),
            "kl": _mean(kl),
            "kl_stderr": _standard_error(kl),
            "perplexity": math.exp(_mean(loss)),
            "full_perplexity": math.exp(_mean(full_loss)),
            "scores": top1,
        } | _held(measured, budget)

    def _windows(self, length: int) -> list[list[int]]:
        settings = self.settings
        return make_windows(self._text_tokens, length, settings.continuation, settings.samples)

    @cached_property
    def _text_tokens(self) -> list[int]:
        return self.tokenizer.encode(read_text(self.settings.text), add_special_tokens=False)

    def _share(self, key: tuple[str, int], prepare: Callable[[], Any]) -> Any:
        """What points of one task and length have in common; only the last is kept."""
        if self._shared[0] != key:
            self._shared = (None, None)
            self._shared = (key, prepare())
        return self._shared[1]

    @cached_property
    def _stops(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        own = self.tokenizer.eos_token_id
        return frozenset([*ends, *([] if own is None else [own])])

    def _facts(self, point: Point) -> dict[str, Any]:
        """What decides the point's result."""
        settings = self.settings
        facts = dataclasses.asdict(point) | {
            "model": self.model_name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "samples": settings.samples,
            "seed": settings.seed,
            "protocol_version": _PROTOCOL_VERSION,
        }
        if point.task == TEXT:
            facts |= {"continuation": settings.continuation, "chunk": settings.chunk, "hold_back": 1}
        elif point.protocol == "question-aware":
            facts |= {"hold_back": settings.hold_back}
        if point.task == TEXT or TASKS[point.task].reads_text:
            facts |= {"text": self._text_hash}
        return facts

    @cached_property
    def _text_hash(self) -> str:
        return hashlib.sha256(read_text(self.settings.text).encode()).hexdigest()[:16]

    def _provenance(self) -> dict[str, Any]:
        return provenance(self.model.device) | {"batch": self.settings.batch}


def _held(measured: Sequence[Measured], budget: int | None) -> dict[str, Any]:
    """Memory for one sequence, averaged over batches by their sizes."""
    weights = [held.sequences for held in measured]

    def mean(values: Iterable[float]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    names = dict.fromkeys(name for held in measured for name in held.by_component)
    held_bytes, full_bytes = mean(m.bytes_held for m in measured), mean(m.full_bytes for m in measured)
    device_bytes = mean(m.device_bytes for m in measured)
    return {
        "budget_tokens": budget,
        "bytes": round(held_bytes),
        "full_bytes": round(full_bytes),
        "ratio": round(held_bytes / full_bytes, 5),
        "device_bytes": round(device_bytes),
        "host_bytes": round(held_bytes) - round(device_bytes),
        "fetched_bytes": round(mean(m.fetched_bytes for m in measured)),
        "by_component": {name: round(mean(m.by_component.get(name, 0.0) for m in measured)) for name in names},
        "tokens_seen": round(mean(m.tokens_seen for m in measured), 2),
        "tokens_kept": round(mean(m.tokens_kept for m in measured), 2),
        "least_kept": min(m.least_kept for m in measured),
        "most_kept": max(m.most_kept for m in measured),
        "compressed": device_bytes < full_bytes,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the spread of the samples; None for a single one."""
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))
