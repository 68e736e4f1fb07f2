"""Accuracy against memory: every method at every budget on every task, one result row per point.

Rows are written to `results.jsonl` as soon as they are measured, with what is needed to reproduce them; an interrupted
sweep resumes where it stopped. The full cache (ceiling) and sinks + recent tokens (floor) always take part. A budget is
converted to tokens by the requested length, so that all methods hold equally many, under both protocols.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvcompress.evals.provenance import provenance
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.claims import Claims
from kvcompress.evals.sweep.intervals import estimate
from kvcompress.evals.sweep.points import Point, Settings
from kvcompress.evals.sweep.rows import Parts, Results
from kvcompress.evals.sweep.samples import Tokenizer
from kvcompress.evals.sweep.task import MEASURED, BuildCache, PartedTask, Subject, Task

# part of every key: increase it whenever the same settings come to mean another measurement
_PROTOCOL_VERSION = 1
# samples without which no point ends early
_FEWEST = 8
# how many seconds to wait before reading again what other processes have done
_PAUSE = 1.0


@dataclass(frozen=True)
class Unit:
    """What is measured at one go: one part of points that read the same samples, or one point of a task without parts.

    points: those to measure. group: all that read the same samples.
    """

    points: tuple[Point, ...]
    group: tuple[Point, ...]
    part: int


# told of a point, and of how much of it has just been measured, from 0 to 1: 0 before a part is begun
OnPart = Callable[[Point, float], None]
OnRow = Callable[[Point, dict[str, Any]], None]


@dataclass
class Sweep:
    """A sweep of one model. `run` measures what is missing and returns the rows of all points, in their order.

    tasks: those of the settings, by name (evals/tasks.py makes them).
    forget: measure again what the folder already has; old rows stay in the file, but the newest count.
    rank, processes: for processes that run the same sweep on one folder. Each measures what no other has claimed,
        writes to its own file, and returns when all points are done; others take over what a killed one had begun.
    precision: points of tasks with parts end early, together with those that read the same samples, once half of each
        score's 95 % interval is at most this; None: they read all samples.
    seconds: after so many nothing is begun. Points that have read samples get a row of those, all that read the same
        of as many, and go on in the next run; None: no limit.
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
    precision: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.precision is not None and not 0 < self.precision < 1:
            raise ValueError(f"precision must be between 0 and 1, got {self.precision}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds must be more than 0, got {self.seconds}")
        self.points = [point for task in self.tasks.values() for point in task.points()]
        self.subject = Subject(self.model, self.tokenizer, self.build)
        # files are read for them
        self._keys: dict[Point, str] = {}
        suffix = "jsonl" if self.processes == 1 else f"{self.rank}.jsonl"
        self.results = Results(self.folder, self.forget, f"results.{suffix}")
        self.parts = Parts(self.folder, self.forget, f"parts.{suffix}")

    def key(self, point: Point) -> str:
        """A hash of everything that decides what the point measures."""
        if point not in self._keys:
            self._keys[point] = self._key(point)
        return self._keys[point]

    def _key(self, point: Point) -> str:
        return hashlib.sha256(json.dumps(self.facts(point), sort_keys=True).encode()).hexdigest()[:16]

    def missing(self) -> list[Point]:
        """Points without a row that succeeded."""
        return [point for point in self.points if not self.results.is_done(self.key(point), self.precision)]

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

    def run(self, on_row: OnRow | None = None, on_part: OnPart | None = None) -> list[dict[str, Any]]:
        """Measures the missing points, and returns the rows that there are; a failure is recorded, the others go on."""
        self._on_row, self._on_part = on_row, on_part
        self._ends = math.inf if self.seconds is None else time.monotonic() + self.seconds
        # what an earlier run has left, to be measured again
        self._before = {self.key(point): self.results.rows.get(self.key(point)) for point in self.missing()}
        self._ended: set[str] = set()
        self._claims = Claims(self.folder) if self.processes > 1 else None
        units = self._units()
        # each process starts at a different one, all near the first: a run that is cut off has first parts
        units = units[self.rank :] + units[: self.rank]
        while units or self._unfinished():
            for unit in units:
                with self._claim(f"{self.key(unit.points[0])}.{unit.part}") as ours:
                    if ours:
                        self._reload()
                        self._measure(unit)
            self._reload()
            for point in self._unfinished():
                self._settle(point)
            units = [unit for unit in units if self._open(unit)]
            if units or self._unfinished():
                time.sleep(_PAUSE)
        if self._is_out_of_time() and self.rank == 0:
            self._cut_off()
        rows = [self.results.rows[self.key(point)] for point in self.points if self.key(point) in self.results.rows]
        if self.rank == 0 and not self.missing() and not any("stopped_at" in row for row in rows):
            self.parts.clear()
        return rows

    def _reload(self) -> None:
        if self.processes > 1:
            self.results.reload()
            self.parts.reload()

    def _claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True) if self._claims is None else self._claims.claim(name)

    def _units(self) -> list[Unit]:
        """What there is to measure, in the order of the points: parts first of what points share."""
        groups: dict[Any, list[Point]] = {}
        for point in self.missing():
            shares = isinstance(self.tasks[point.task], PartedTask)
            groups.setdefault((point.task, point.length, point.protocol) if shares else point, []).append(point)
        units = [
            Unit(tuple(points), tuple(points), part)
            for points in groups.values()
            for part in range(self._count(points[0]))
        ]
        if len(units) >= self.processes:
            return units
        # better a forward twice than a process without work
        return [Unit((point,), unit.group, unit.part) for unit in units for point in unit.points]

    def _settle(self, point: Point) -> None:
        """Gives a point its row if all of its parts are there, unless another process does."""
        with self._claim(self.key(point)) as ours:
            if ours:
                self._reload()
                parts = self._known(point)
                if len(parts) == self._count(point) and not self._has_row(point):
                    self._finish(point, parts)

    def _unfinished(self) -> list[Point]:
        """Points whose parts were measured by several processes, none of which knew all."""
        parted = [point for point in self.points if isinstance(self.tasks[point.task], PartedTask)]
        waiting = [point for point in parted if self.key(point) in self._before and not self._has_row(point)]
        return [point for point in waiting if len(self._known(point)) == self._count(point)]

    def _count(self, point: Point) -> int:
        task = self.tasks[point.task]
        return task.parts(point, self.subject) if isinstance(task, PartedTask) else 1

    def batch(self, point: Point) -> int:
        """How many sequences are read at a time."""
        task = self.tasks[point.task]
        return task.batch(point, self.subject) if isinstance(task, PartedTask) else self.settings.batch

    def _open(self, unit: Unit) -> list[Point]:
        """The points of a unit that have neither a row of this run nor this part."""
        if self._is_out_of_time():
            return []
        if unit.part and self._is_precise(unit):
            self._close(unit.group, unit.part, "precision")
        return [
            p for p in unit.points if not self._has_row(p) and not self.parts.has(self.key(p), self.batch(p), unit.part)
        ]

    def _has_row(self, point: Point) -> bool:
        row = self.results.rows.get(self.key(point))
        if self.key(point) in self._ended:
            # also where what was known of it before still stands
            return True
        return row is not None and row != self._before.get(self.key(point))

    def _is_precise(self, unit: Unit) -> bool:
        """Whether all points are known well enough from the parts before this one."""
        if self.precision is None:
            return False
        open_points = [point for point in unit.group if not self._has_row(point)]
        found = [self._known(point) for point in open_points]
        if not open_points or any(len(parts) < unit.part for parts in found):
            return False
        rows = [self._joined(point, parts[: unit.part]) for point, parts in zip(open_points, found, strict=True)]
        return all(row["samples"] >= _FEWEST and _half_width(row) <= self.precision for row in rows)

    def _is_out_of_time(self) -> bool:
        return time.monotonic() > self._ends

    def _close(self, group: Sequence[Point], count: int, reason: str) -> None:
        """Gives points the rows of their first parts, so many of them."""
        for point in group:
            parts = self._known(point)[:count]
            if parts and not self._has_row(point):
                self._finish(point, parts, reason)

    def _cut_off(self) -> None:
        """Gives points the rows of the parts that there are: of as many samples all that read the same, if each has
        one."""
        groups = {unit.group: None for unit in self._units()}
        for group in groups:
            if isinstance(self.tasks[group[0].task], PartedTask):
                counts = [len(self._known(point)) for point in group if not self._has_row(point)]
                self._close(group, min(counts, default=0) or max(counts, default=0), "time")

    def _measure(self, unit: Unit) -> None:
        for point in self._open(unit):
            if self._is_out_of_time():
                return
            if self._on_part is not None:
                self._on_part(point, 0.0)
            started = time.perf_counter()
            task = self.tasks[point.task]
            try:
                if isinstance(task, PartedTask):
                    found = task.measure_part(point, self.subject, unit.part)
                else:
                    found = _checked(point, self.measure(point))
            except Exception as error:
                self._fail(point, error, time.perf_counter() - started)
                continue
            took = time.perf_counter() - started
            count = self._count(point)
            if not isinstance(task, PartedTask):
                self._add(point, {"status": "ok"} | found, took)
            else:
                self.parts.append(self.key(point), self.batch(point), unit.part, found, took)
                self._settle(point)
            if self._on_part is not None:
                self._on_part(point, 1 / count)

    def _known(self, point: Point) -> list[dict[str, Any]]:
        return self.parts.of(self.key(point), self.batch(point))

    def _joined(self, point: Point, parts: list[dict[str, Any]]) -> dict[str, Any]:
        task = self.tasks[point.task]
        assert isinstance(task, PartedTask)
        return _checked(point, task.join(point, [part["found"] for part in parts], self.subject))

    def _finish(self, point: Point, parts: list[dict[str, Any]], reason: str = "") -> None:
        seconds = sum(part["seconds"] for part in parts)
        try:
            found = {"status": "ok"} | self._joined(point, parts)
        except Exception as error:
            self._fail(point, error, seconds)
            self.parts.discard(self.key(point), self.batch(point))
            return
        if len(parts) < self._count(point):
            width = _half_width(found)
            found["stopped_at"] = {"reason": reason, "half_width": width if math.isfinite(width) else None}
        self._add(point, found, seconds)

    def _fail(self, point: Point, error: Exception, seconds: float) -> None:
        said = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
        self._add(point, {"status": "failed"} | said, seconds)

    def _add(self, point: Point, found: dict[str, Any], seconds: float) -> None:
        source = provenance(self.model.device) | {"batch": self.batch(point)}
        row = {"key": self.key(point)} | self.facts(point) | found
        row |= {"seconds": round(seconds, 3), "provenance": source}
        self.results.append(row)
        self._ended.add(self.key(point))
        if self._on_row is not None:
            self._on_row(point, row)


def _half_width(row: dict[str, Any]) -> float:
    """Half of the score's 95 % interval."""
    found = estimate(row)
    return math.inf if found.low is None or found.high is None else (found.high - found.low) / 2


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
