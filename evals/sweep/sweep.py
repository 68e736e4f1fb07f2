"""Accuracy against memory: every method at every budget on every task, one result row a point.

Rows go to `results.jsonl` as soon as they are there, with what is needed to make them again; a sweep that was
interrupted takes up where it stopped. The full cache (ceiling) and sinks + recent tokens (floor) always take part.
A budget is resolved to tokens from the length asked for, so that all methods hold equally many, under both protocols.
"""

import dataclasses
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.agreement import FullReference, make_windows
from kvcompress.evals.sweep.claims import Claims
from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.points import TEXT, Point, Settings, make_points
from kvcompress.evals.sweep.protocol import Measured, Reader, answer, split
from kvcompress.evals.sweep.rows import Results, held, mean_of, standard_error
from kvcompress.evals.sweep.tasks import TASKS, Prompt, Tokenizer, make_prompt, make_samples, read_text, score
from kvcompress.hf import end_tokens

# part of every key: raise it whenever the same settings come to mean another measurement
_PROTOCOL_VERSION = 1
# seconds between two looks at what other processes have done
_PAUSE = 1.0
# bytes of first forwards kept for the caches that share them
_MOST_RECORDED = 4 * 2**30


@dataclass
class Sweep:
    """A sweep of one model. `run` measures what is missing and returns the rows of all points, in their order.

    forget: measure again what the folder already has; its rows stay in the file, and newer ones stand.
    rank, processes: of processes that run the same sweep on one folder. Each measures what no other has claimed, in a
        file of its own, and returns when all points are done; what a killed one had begun, another takes up.
    """

    settings: Settings
    model: PreTrainedModel
    tokenizer: Tokenizer
    folder: Path
    forget: bool = False
    build: Callable[[str, PreTrainedModel, int | None], Any] = baselines.build
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.points = make_points(self.settings)
        name = "results.jsonl" if self.processes == 1 else f"results.{self.rank}.jsonl"
        self.results = Results(self.folder, self.forget, name)
        self._shared: tuple[Any, Any] = (None, None)
        # of the newest task, length and protocol, by the rows of tokens
        self._recorded: tuple[Any, dict[Any, FirstForward]] = (None, {})

    def key(self, point: Point) -> str:
        """A hash of all that decides what the point measures."""
        return hashlib.sha256(json.dumps(self.facts(point), sort_keys=True).encode()).hexdigest()[:16]

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
            if length is None:
                continue
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
        if point.length is None:
            # contexts of unknown length, some hundred of them
            return (settings.limit or 500) * 500
        if point.task == TEXT:
            return settings.samples * (point.length + 40 * settings.continuation // settings.chunk)
        return settings.samples * (point.length + 400)

    def run(self, on_row: Callable[[Point, dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
        """Measures the missing points; one that fails is recorded as such and the rest goes on."""
        missing = self.missing()
        if self.processes == 1:
            for point in missing:
                self._add(point, on_row)
        else:
            self._share_out(missing, on_row)
        return [self.results.rows[self.key(point)] for point in self.points]

    def _share_out(self, points: list[Point], on_row: Callable[[Point, dict[str, Any]], None] | None) -> None:
        """Measures of these what no other process does, until every one has a row of this run."""
        claims = Claims(self.folder)
        before = dict(self.results.rows)

        def is_open(point: Point) -> bool:
            row = self.results.rows.get(self.key(point))
            return row is None or (row["status"] != "ok" and row == before.get(self.key(point)))

        # each begins at another place, as neighbours share their prompts
        first = len(points) * self.rank // self.processes
        points = points[first:] + points[:first]
        while points:
            for point in points:
                with claims.claim(self.key(point)) as ours:
                    if ours:
                        self.results.reload()
                        if is_open(point):
                            self._add(point, on_row)
            self.results.reload()
            points = [point for point in points if is_open(point)]
            if points:
                time.sleep(_PAUSE)

    def _add(self, point: Point, on_row: Callable[[Point, dict[str, Any]], None] | None) -> None:
        started = time.perf_counter()
        try:
            found = {"status": "ok"} | self.measure(point)
        except Exception as error:
            found = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        row = {"key": self.key(point)} | self.facts(point) | found
        row |= {"seconds": round(time.perf_counter() - started, 3), "provenance": self._provenance()}
        self.results.append(row)
        if on_row is not None:
            on_row(point, row)

    def measure(self, point: Point) -> dict[str, Any]:
        """One point's score with its standard error, and its measured bytes."""
        if point.length is None:
            return self._harness.measure(self.model, self.tokenizer, point, self.settings)
        return self._measure_text(point) if point.task == TEXT else self._measure_task(point)

    @property
    def _harness(self) -> Any:
        from kvcompress.evals.lm import points as lm_points

        return lm_points

    def _measure_task(self, point: Point) -> dict[str, Any]:
        settings, tokenizer = self.settings, self.tokenizer
        assert point.length is not None
        length = point.length

        def prepare() -> Any:
            made = make_samples(point.task, tokenizer, length, settings.samples, seed=settings.seed, text=settings.text)
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
            answers, part = answer(
                self.model,
                lambda: self.build(point.method, self.model, budget),
                [prompts[index] for index in chosen],
                point.protocol,
                hold_back=settings.hold_back,
                stops=self.stops,
                must_keep_at_most=budget if budget is not None and budget < shortest else None,
                first=self._first_forward(point, [prompts[index] for index in chosen], len(order)),
            )
            measured.append(part)
            for index, tokens in zip(chosen, answers, strict=True):
                predictions[index] = tokenizer.decode(tokens, skip_special_tokens=True)
        scores = [score(sample, said) for sample, said in zip(samples, predictions, strict=True)]
        return (
            {"metric": "answers found", "score": mean_of(scores), "stderr": standard_error(scores)}
            | held(measured, budget)
            | {
                "scores": scores,
                "depths": [round(sample.depth, 3) for sample in samples],
                "answers": [list(sample.answers) for sample in samples],
                "predictions": predictions,
            }
        )

    def _first_forward(self, point: Point, prompts: Sequence[Prompt], samples: int) -> Callable[[Reader], None]:
        """The first forward of these prompts, which evicting caches share: the model does it once for all."""
        rows = tuple(split(prompt, point.protocol, self.settings.hold_back)[0] for prompt in prompts)
        fits = FirstForward.size(self.model, max(map(len, rows)) * samples) <= _MOST_RECORDED

        def first(reader: Reader) -> None:
            if not (fits and FirstForward.serves(reader.cache)):
                reader.read(rows)
                return
            cell = point.task, point.length, point.protocol
            if self._recorded[0] != cell:
                self._recorded = cell, {}
            known = self._recorded[1]
            if rows not in known:
                known[rows] = FirstForward(self.model, rows)
            known[rows].fill(reader)

        return first

    def _measure_text(self, point: Point) -> dict[str, Any]:
        settings, length = self.settings, point.length
        assert length is not None

        def prepare() -> list[FullReference]:
            windows = self._windows(length)
            batches = [windows[first : first + settings.batch] for first in range(0, len(windows), settings.batch)]
            return [FullReference(self.model, batch, length) for batch in batches]

        references = self._share((point.task, point.length), prepare)
        budget = point.budget_tokens(length + settings.continuation)
        measured: list[Measured] = []
        parts = []
        for reference in references:
            part, memory = reference.compare(
                lambda: self.build(point.method, self.model, budget),
                chunk=settings.chunk,
                must_keep_at_most=budget if budget is not None and budget < length - 1 else None,
            )
            parts.append(part)
            measured.append(memory)
        top1, kl, loss, full_loss = (
            [value for part in parts for value in getattr(part, name)] for name in ("top1", "kl", "loss", "full_loss")
        )
        errors = [layers for part in parts for layers in part.attention_error]
        return {
            "metric": "top-1 agreement",
            "score": mean_of(top1),
            "stderr": standard_error(top1),
            "kl": mean_of(kl),
            "kl_stderr": standard_error(kl),
            "attention_error": mean_of([mean_of(layers) for layers in errors]),
            "attention_error_stderr": standard_error([mean_of(layers) for layers in errors]),
            "attention_error_by_layer": [round(mean_of(layer), 6) for layer in zip(*errors, strict=True)],
            "perplexity": math.exp(mean_of(loss)),
            "full_perplexity": math.exp(mean_of(full_loss)),
            "scores": top1,
        } | held(measured, budget)

    def _windows(self, length: int) -> list[list[int]]:
        settings = self.settings
        return make_windows(self._text_tokens, length, settings.continuation, settings.samples)

    @cached_property
    def _text_tokens(self) -> list[int]:
        return self.tokenizer.encode(read_text(self.settings.text), add_special_tokens=False)

    def _share(self, key: tuple[str, int | None], prepare: Callable[[], Any]) -> Any:
        """What points of one task and length have in common; only the last is kept."""
        if self._shared[0] != key:
            self._shared = (None, None)
            self._shared = (key, prepare())
        return self._shared[1]

    @cached_property
    def stops(self) -> frozenset[int]:
        ends = end_tokens(self.model)
        own = self.tokenizer.eos_token_id
        return frozenset([*ends, *([] if own is None else [own])])

    def facts(self, point: Point) -> dict[str, Any]:
        """What decides the point's result."""
        settings = self.settings
        facts = dataclasses.asdict(point) | {
            "model": self.model_name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "seed": settings.seed,
            "protocol_version": _PROTOCOL_VERSION,
        }
        if point.length is None:
            return facts | self._harness.facts(point, settings)
        facts |= {"samples": settings.samples}
        if point.task == TEXT:
            # rows of an older version lack the errors of attention
            facts |= {"continuation": settings.continuation, "chunk": settings.chunk, "hold_back": 1, "text_version": 2}
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
