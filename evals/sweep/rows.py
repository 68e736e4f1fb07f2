"""A sweep's rows on disk, each written completely or not at all."""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvcompress.evals.sweep.protocol import Measured
from kvcompress.policies.settings import RENAMED


class Results:
    """The rows in a folder, from all processes; new ones go to `name`. The newest row of a key counts."""

    def __init__(self, folder: Path, forget: bool = False, name: str = "results.jsonl") -> None:
        self.path = folder / name
        self.rows: dict[str, dict[str, Any]] = {}
        if not forget:
            self.reload()

    def reload(self) -> None:
        """Reads what other processes have written."""
        self.rows |= read_rows(self.path.parent)

    def is_done(self, key: str, precision: float | None = None) -> bool:
        """True if a row of this key succeeded, with all of its samples or, if asked, with this precision."""
        row = self.rows.get(key, {})
        if row.get("status") != "ok" or "stopped_at" not in row:
            return row.get("status") == "ok"
        reason, reached = row["stopped_at"]["reason"], row["stopped_at"]["half_width"]
        return reason == "precision" and precision is not None and bool(reached <= precision)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, in one write that is on disk when this returns."""
        _append(self.path, row)
        if row["key"] not in self.rows or _replaces(row, self.rows[row["key"]]):
            self.rows[row["key"]] = row


# what a line of parts holds
_PART = {"key", "batch", "part", "found", "seconds"}


class Parts:
    """What was measured of points that are not finished, in a folder, from all processes; new parts go to `name`."""

    def __init__(self, folder: Path, forget: bool = False, name: str = "parts.jsonl") -> None:
        self.path = folder / name
        self._found: dict[tuple[str, int, int], dict[str, Any]] = {}
        if forget:
            self.clear()
        self.reload()

    def reload(self) -> None:
        """Reads what other processes have measured."""
        for path in self._paths():
            for part in _lines(path):
                if part.keys() >= _PART and isinstance(part["batch"], int) and isinstance(part["part"], int):
                    place = part["key"], part["batch"], part["part"]
                    # the newest, whoever wrote it
                    if place not in self._found or part.get("time", 0.0) >= self._found[place].get("time", 0.0):
                        self._found[place] = part

    def of(self, key: str, batch: int) -> list[dict[str, Any]]:
        """A point's first parts, up to the first that is missing, each of so many samples."""
        found: list[dict[str, Any]] = []
        while self.has(key, batch, len(found)):
            found.append(self._found[key, batch, len(found)])
        return found

    def has(self, key: str, batch: int, part: int) -> bool:
        # one that was discarded has found nothing
        return self._found.get((key, batch, part), {}).get("found") is not None

    def append(self, key: str, batch: int, part: int, found: dict[str, Any] | None, seconds: float) -> None:
        """Adds a part, which is on disk when this returns."""
        line = {"key": key, "batch": batch, "part": part, "found": found, "seconds": seconds}
        line["time"] = time.time()
        _append(self.path, line)
        # as it will be read again
        self._found[key, batch, part] = json.loads(json.dumps(line))

    def discard(self, key: str, batch: int) -> None:
        """Lets a point's parts be measured again, as they do not make a row."""
        for known, size, part in list(self._found):
            if (known, size) == (key, batch):
                self.append(key, batch, part, None, 0.0)

    def clear(self) -> None:
        """Deletes all parts of all processes."""
        self._found.clear()
        for path in self._paths():
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(self.path.parent.glob("parts*.jsonl"))


def _append(path: Path, value: dict[str, Any]) -> None:
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                # ends a line that was cut off, so that it does not damage the new one
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def damaged(folder: Path) -> list[str]:
    """The lines of a sweep's results that are no rows, for people: such as the last one, where a machine went down."""
    found = []
    for path in sorted(folder.glob("results*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip() and _entry(line) is None:
                found.append(f"{path}:{number}")
    return found


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each key, from the folder's results.jsonl and the files of several processes."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for row in _lines(path):
            if row["key"] not in rows or _replaces(row, rows[row["key"]]):
                rows[row["key"]] = row
    return rows


def _replaces(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a row stands for another of its key: if it is newer, but not if it has failed or stopped earlier where
    the other one has read samples."""
    if _time(row) < _time(other):
        return not _replaces(other, row)
    if row["status"] != "ok":
        return "stopped_at" not in other
    return other["status"] != "ok" or row.get("samples", 0) >= other.get("samples", 0)


def _time(row: dict[str, Any]) -> str:
    return str(row.get("provenance", {}).get("time", ""))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        # another process has finished, and no longer needs it
        return
    for row in map(_entry, lines):
        if row is not None:
            for old, new in RENAMED.items():
                if "method" in row:
                    row["method"] = row["method"].replace(f":{old}=", f":{new}=")
            yield row


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if that is nothing with a key."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and "key" in row:
            return row
    return None


def held(measured: Sequence[Measured], budget: int | None) -> dict[str, Any]:
    """A row's fields about the memory per sequence."""
    mean = Measured.mean(measured)
    return {
        "budget_tokens": budget,
        "bytes": round(mean.bytes_held),
        "full_bytes": round(mean.full_bytes),
        "ratio": round(mean.ratio, 5),
        "device_bytes": round(mean.device_bytes),
        "host_bytes": round(mean.bytes_held) - round(mean.device_bytes),
        "fetched_bytes": round(mean.fetched_bytes),
        "by_component": {name: round(size) for name, size in mean.by_component.items()},
        "tokens_seen": round(mean.tokens_seen, 2),
        "tokens_kept": round(mean.tokens_kept, 2),
        "least_kept": mean.least_kept,
        "most_kept": mean.most_kept,
        "compressed": mean.device_bytes < mean.full_bytes,
    }


def mean_of(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, from the spread of the samples; None for a single one."""
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))
