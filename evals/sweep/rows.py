"""A sweep's rows on the disk, each there in full or not at all."""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvcompress.caches.evicting import RENAMED
from kvcompress.evals.sweep.protocol import Measured


class Results:
    """The rows of a folder, of whatever process; new ones go to `name`. The newest row of a key stands."""

    def __init__(self, folder: Path, forget: bool = False, name: str = "results.jsonl") -> None:
        self.path = folder / name
        self.rows: dict[str, dict[str, Any]] = {}
        if not forget:
            self.reload()

    def reload(self) -> None:
        """Takes in what other processes have written."""
        self.rows |= read_rows(self.path.parent)

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


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each key, in the folder's results.jsonl and those of several processes."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for row in _lines(path):
            if row["key"] not in rows or _time(rows[row["key"]]) <= _time(row):
                rows[row["key"]] = row
    return rows


def _time(row: dict[str, Any]) -> str:
    return str(row.get("provenance", {}).get("time", ""))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "key" in row:
                for old, new in RENAMED.items():
                    if "method" in row:
                        row["method"] = row["method"].replace(f":{old}=", f":{new}=")
                yield row


def held(measured: Sequence[Measured], budget: int | None) -> dict[str, Any]:
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


def mean_of(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the spread of the samples; None for a single one."""
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))
