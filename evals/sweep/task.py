"""The interface of a sweep's tasks, and the subject that they measure: one model, with a new cache for each point."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedModel

from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.points import Point
from kvcompress.evals.sweep.samples import Tokenizer
from kvcompress.hf import end_tokens

# what every task measures
MEASURED = ("metric", "score", "stderr", "bytes")
BuildCache = Callable[[str, PreTrainedModel, int | float | None], Any]


@dataclass
class Subject:
    """The model whose caches are measured, its tokenizer, and what builds a cache from a method and a budget."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    build: BuildCache
    _newest: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def share(self, slot: str, key: Any, prepare: Callable[[], Any]) -> Any:
        """What points with one key have in common; a slot keeps only the newest, as it may be large."""
        if self._newest.get(slot, (None,))[0] != key:
            # frees the previous one before the next is made
            self._newest.pop(slot, None)
            self._newest[slot] = key, prepare()
        return self._newest[slot][1]

    def batch(self, asked: int, tokens: int) -> int:
        """How many sequences of so many tokens to read at a time: those asked for, unless a recording holds fewer."""
        return min(asked, FirstForward.most_rows(self.model, tokens)) or asked

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        own = self.tokenizer.eos_token_id
        return frozenset([*end_tokens(self.model), *([] if own is None else [own])])


class Task(Protocol):
    """One task of a sweep, made from its name and the sweep's settings."""

    name: str

    def points(self) -> list[Point]:
        """All points to measure.

        Raises:
            ValueError: the settings do not suit the task.
        """

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if a length cannot hold the task, or the hold-back is longer than a question."""

    def cost(self, point: Point) -> int:
        """Roughly how long a point takes, in tokens read."""

    def facts(self, point: Point) -> dict[str, Any]:
        """What decides a point's result, in addition to the point itself, the model and the seed."""

    def measure(self, point: Point, subject: Subject) -> dict[str, Any]:
        """What a row holds of a point, as JSON can: MEASURED, and whatever else.

        metric: what the score is called. score: a finite number. stderr: its standard error, or None.
        bytes: measured per sequence; `kvcompress.evals.sweep.rows.held` gives them, with all else about memory.
        """


class PartedTask(ABC):
    """A `Task` whose points are measured a batch of samples at a time: its parts.

    Points of one length and protocol read the same samples. A sweep measures a part of all of them before the next, so
    that what they share is in memory once, and a run that stops loses one part of one point.
    """

    @abstractmethod
    def batch(self, point: Point, subject: Subject) -> int:
        """How many samples a part has; the last one may have fewer."""

    @abstractmethod
    def parts(self, point: Point, subject: Subject) -> int:
        """How many parts a point has, at least 1."""

    @abstractmethod
    def measure_part(self, point: Point, subject: Subject, part: int) -> dict[str, Any]:
        """What is measured on one part, as JSON can hold it."""

    @abstractmethod
    def join(self, point: Point, parts: Sequence[dict[str, Any]], subject: Subject) -> dict[str, Any]:
        """What `Task.measure` returns, of the first parts of a point; samples: how many they have together."""

    def measure(self, point: Point, subject: Subject) -> dict[str, Any]:
        """As `Task.measure`, of all parts."""
        parts = range(self.parts(point, subject))
        return self.join(point, [self.measure_part(point, subject, part) for part in parts], subject)
