"""Accuracy against memory: every method at every budget on every task, one result row per point.

Rows are written to `results.jsonl` as soon as they are measured, with what is needed to reproduce them; an interrupted
sweep resumes where it stopped. The full cache (ceiling) and sinks + recent tokens (floor) always take part. A budget is
converted to tokens by the requested length, so that all methods hold equally many, under both protocols.
"""

import dataclasses
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.claims import Claims
from kvcompress.evals.sweep.points import Point, Settings
from kvcompress.evals.sweep.rows import Results
from kvcompress.evals.sweep.samples import Tokenizer
from kvcompress.evals.sweep.task import MEASURED, BuildCache, Subject, Task

# part of every key: increase it whenever the same settings come to mean another measurement
_PROTOCOL_VERSION = 1
# how many seconds to wait before reading again what other processes have done
_PAUSE = 1.0


@dataclass
class Sweep:
    """A sweep of one model. `run` measures what is missing and returns the rows of all points, in their order.

    tasks: those of the settings, by name (evals/tasks.py makes them).
    forget: measure again what the folder already has; old rows stay in the file, but the newest count.
    rank, processes: for processes that run the same sweep on one folder. Each measures what no other has claimed,
        writes to its own file, and returns when all points are done; others take over what a killed one had begun.
    """

    settings: Settings
    tasks: Mapping[str, Task]
    model: PreTrainedModel
    tokenizer: Tokenizer
    folder: Path
    forget: bool = False
    build: BuildCache = baselines.build
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.points = [point for task in self.tasks.values() for point in task.points()]
        self.subject = Subject(self.model, self.tokenizer, self.build)
        name = "results.jsonl" if self.processes == 1 else f"results.{self.rank}.jsonl"
        self.results = Results(self.folder, self.forget, name)

    def key(self, point: Point) -> str:
        """A hash of everything that decides what the point measures."""
        return hashlib.sha256(json.dumps(self.facts(point), sort_keys=True).encode()).hexdigest()[:16]

    def missing(self) -> list[Point]:
        """Points without a row that succeeded."""
        return [point for point in self.points if not self.results.is_done(self.key(point))]

    def check_tasks(self) -> None:
        """Makes one sample of each task at each length.

        Raises:
            ValueError: a length cannot hold its task, or the hold-back is longer than a question.
        """
        for task in self.tasks.values():
            task.check(self.tokenizer)

    @property
    def model_name(self) -> str:
        """The model's name as the user gave it."""
        return self.model.name_or_path or type(self.model).__name__

    def cost(self, point: Point) -> int:
        """Roughly how long a point takes, in tokens read."""
        return self.tasks[point.task].cost(point)

    def measure(self, point: Point) -> dict[str, Any]:
        """What a point's task measures."""
        return self.tasks[point.task].measure(point, self.subject)

    def facts(self, point: Point) -> dict[str, Any]:
        """What decides the point's result."""
        return (
            dataclasses.asdict(point)
            | {
                "model": self.model_name,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": self.model.device.type,
                "seed": self.settings.seed,
                "protocol_version": _PROTOCOL_VERSION,
            }
            | baselines.source(point.method)
            | self.tasks[point.task].facts(point)
        )

    def run(self, on_row: Callable[[Point, dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
        """Measures the missing points; a failure is recorded, and the others continue."""
        missing = self.missing()
        if self.processes == 1:
            for point in missing:
                self._add(point, on_row)
        else:
            self._share_out(missing, on_row)
        return [self.results.rows[self.key(point)] for point in self.points]

    def _share_out(self, points: list[Point], on_row: Callable[[Point, dict[str, Any]], None] | None) -> None:
        """Measures those of these points that no other process does, until each has a row of this run."""
        claims = Claims(self.folder)
        before = dict(self.results.rows)

        def is_open(point: Point) -> bool:
            row = self.results.rows.get(self.key(point))
            return row is None or (row["status"] != "ok" and row == before.get(self.key(point)))

        # each process starts at a different point, as neighbouring points share their prompts
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
            found = {"status": "ok"} | _checked(point, self.measure(point))
        except Exception as error:
            found = {
                "status": "failed",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        row = {"key": self.key(point)} | self.facts(point) | found
        source = provenance(self.model.device) | {"batch": self.settings.batch}
        row |= {"seconds": round(time.perf_counter() - started, 3), "provenance": source}
        self.results.append(row)
        if on_row is not None:
            on_row(point, row)


def _checked(point: Point, found: dict[str, Any]) -> dict[str, Any]:
    """What a task measured, if a row and a report can hold it; else ValueError."""
    missing = [name for name in MEASURED if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"the task {point.task} must measure {', '.join(MEASURED)}, got no {', '.join(missing)}")
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the task {point.task} measured what JSON cannot hold: {error}") from None
    return found
