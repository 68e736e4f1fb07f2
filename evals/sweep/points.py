"""What a sweep measures: its settings, and the points that they span."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from kvcompress import registry
from kvcompress.caches.budget import Budget
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.protocol import PROTOCOLS, SEVERAL
from kvcompress.evals.sweep.samples import TRANSCRIPT, read_text
from kvcompress.policies.settings import nearest

# the protocol of tasks without a question
CONTINUATION = "continuation"


@dataclass(frozen=True)
class Settings:
    """What to sweep.

    methods: specs of the registry. budgets: tokens (int), or fractions of the length (float; 1.0 keeps everything).
    tasks: names that evals/tasks.py knows. lengths: context tokens. samples: prompts, or windows of text, per point;
        lm-eval's tasks use neither.
    hold_back: tokens of the question read after compression, if question-aware. batch: sequences at a time.
    text: a file for "text" and the essay haystacks. continuation, chunk: tokens scored, and read per forward, on text.
    turns: questions of each context, in multi-turn and multi-request.
    transcript: the most tokens of an answer to state_tracking.
    documents: a file of documents, or a folder of them, for RULER's questions about documents.
    num_fewshot, limit, metadata: for lm-eval's tasks, as its own command takes them.
    question: the text with which their questions begin; None for the last example of a few-shot context.
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
    num_fewshot: int | None = None
    limit: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    question: str | None = None
    documents: str | None = None
    turns: int = 5
    transcript: int = TRANSCRIPT

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS + SEVERAL:
                known = PROTOCOLS + SEVERAL
                raise ValueError(f"unknown protocol {protocol!r}; {nearest(protocol, known)}known: {', '.join(known)}")
        for name in ("methods", "budgets", "tasks", "lengths", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("samples", "batch", "hold_back", "continuation", "chunk", "transcript"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.turns < 2:
            raise ValueError(f"turns must be at least 2, got {self.turns}")
        if (self.limit is not None and self.limit < 1) or (self.num_fewshot is not None and self.num_fewshot < 0):
            raise ValueError(
                f"limit must be at least 1 and num_fewshot at least 0, got {self.limit} and {self.num_fewshot}"
            )
        for length in self.lengths:
            if length < 2:
                raise ValueError(f"a length must be at least 2 tokens, got {length}")
        for budget in self.budgets:
            Budget(budget)
        for method in self.methods:
            baselines.parse(method)

    @cached_property
    def text_hash(self) -> str:
        """A hash of the text."""
        return hashlib.sha256(read_text(self.text).encode()).hexdigest()[:16]


def of_one_question(task: str, protocols: Iterable[str]) -> list[str]:
    """The protocols that suit a task which has one question for each context.

    Raises:
        ValueError: all of them ask several.
    """
    asked = list(protocols)
    found = [protocol for protocol in asked if protocol not in SEVERAL]
    if not found:
        raise ValueError(f"{asked[0]} asks several questions of one context, and the task {task} has only one")
    return found


@dataclass(frozen=True)
class Point:
    """One measurement.

    length: None for lm-eval's tasks, which have their own contexts. budget: None for methods that keep every token.
    """

    task: str
    length: int | None
    protocol: str
    method: str
    budget: int | float | None

    @property
    def context(self) -> int:
        """The length, for a task that has one."""
        assert self.length is not None
        return self.length

    def budget_tokens(self, capacity: int) -> int | None:
        """The budget in tokens; a fraction of 1.0 is `capacity`, the most that a sequence may grow to."""
        if self.budget is None or isinstance(self.budget, int):
            return self.budget
        return capacity if self.budget == 1.0 else max(1, round(self.budget * self.context))

    @property
    def title(self) -> str:
        """For people."""
        words = (self.task, self.length, f"{self.protocol},", self.method, self.budget)
        return " ".join(str(word) for word in words if word is not None)


def make_points(task: str, lengths: Iterable[int | None], protocols: Iterable[str], settings: Settings) -> list[Point]:
    """A task's points, with ceiling and floor; points that share prompts are adjacent."""
    methods: dict[str, list[int | float | None]] = {registry.FULL: [None]}
    for spec in (*settings.methods, registry.FLOOR):
        found, own = baselines.parse(spec)
        # a method with its own budget is measured at that
        budgets = [own.pop("budget")] if "budget" in own else list(settings.budgets) if found.takes_budget else [None]
        methods.setdefault(registry.spelled(found, own), []).extend(budgets)
    return [
        Point(task, length, protocol, method, budget)
        for length in dict.fromkeys(lengths)
        for protocol in dict.fromkeys(protocols)
        for method, budgets in methods.items()
        for budget in dict.fromkeys(budgets)
    ]


def check_budgets(model: PreTrainedModel, points: Iterable[Point]) -> None:
    """Builds each cache once, empty.

    Raises:
        ValueError: a method refuses its budget or its settings.
    """
    asked = ((point.method, point.budget if point.length is None else point.budget_tokens(2**20)) for point in points)
    for method, budget in dict.fromkeys(asked):
        try:
            baselines.build(method, model, budget)
        except ValueError as error:
            asked_for = "" if budget is None else f" at a budget of {budget}{' tokens' * isinstance(budget, int)}"
            raise ValueError(f"{method}{asked_for}: {error}") from None
