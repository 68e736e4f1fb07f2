"""Means over tasks: one figure and one share of bytes for each method and budget, by model, protocol and length.

A mean is taken only over tasks that every method of the protocol and length has, so that all have sat the same exams.
Tasks whose scores are no shares from 0 to 1, or where less is better, stay out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompress.evals.sweep.intervals import Estimate, Row, estimate, is_share, mean
from kvcompress.evals.sweep.panels import one_each, rank, samples, share
from kvcompress.evals.sweep.rows import mean_of


@dataclass(frozen=True)
class Entry:
    """A method at a budget: its mean over tasks, and its bytes over those of the full cache.

    samples: of a task, from the fewest to the most.
    """

    score: Estimate
    share: float | None
    samples: str = ""


@dataclass(frozen=True)
class Means:
    """One protocol and length, of one model.

    model: its name, where there are several. tasks: those of the means. left_out: other tasks, with what kept them out.
    entries: by method and budget; one that failed at a task has none.
    """

    model: str
    protocol: str
    length: int | None
    tasks: tuple[str, ...]
    left_out: dict[str, str]
    entries: dict[tuple[str, int | float | None], Entry]

    @property
    def samples(self) -> str:
        """How many samples of a task most entries have."""
        return next(iter(dict(Counter(entry.samples for entry in self.entries.values()).most_common(1))), "")

    @property
    def title(self) -> str:
        """For people."""
        of_model = f"{self.model}: " if self.model else ""
        return f"{of_model}{self.protocol}" + (f", {self.length} tokens" if self.length is not None else "")


def make_means(rows: Sequence[Row]) -> list[Means]:
    """The means of every model, protocol and length; without entries where no task was measured with all methods."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in one_each(rows):
        if row["status"] == "ok":
            groups.setdefault((row["model"], row["protocol"], row["length"]), []).append(row)
    models = {model for model, _, _ in groups}
    return [
        _means(Path(model).name if len(models) > 1 else "", protocol, length, members)
        for (model, protocol, length), members in groups.items()
    ]


def _means(model: str, protocol: str, length: int | None, rows: Sequence[Row]) -> Means:
    methods = sorted({row["method"] for row in rows}, key=rank)
    tasks, left_out = [], {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        lacking = [method for method in methods if method not in {row["method"] for row in own}]
        if not all(is_share(row) for row in own):
            left_out[task] = "its scores are no shares"
        elif lacking:
            left_out[task] = f"not measured with {', '.join(lacking)}"
        else:
            tasks.append(task)
    entries = {}
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["method"], row["budget"]) == (method, budget) and row["task"] in tasks]
        if tasks and len({row["task"] for row in own}) == len(tasks):
            shares = [one for row in own if (one := share(row)) is not None]
            score = mean([estimate(row) for row in own])
            entries[method, budget] = Entry(score, mean_of(shares) if shares else None, samples(own))
    return Means(model, protocol, length, tuple(tasks), left_out, entries)
