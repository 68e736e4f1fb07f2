"""A sweep's rows on disk, each written completely or not at all."""

import contextlib
import json
import math
import os
import statistics
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

    def is_done(self, key: str) -> bool:
        """True if a row of this key succeeded."""
        return self.rows.get(key, {}).get("status") == "ok"

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, in one write that is on disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    # ends a line that was cut off, so that it does not damage the new one
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each key, from the folder's results.jsonl and the files of several processes."""
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
