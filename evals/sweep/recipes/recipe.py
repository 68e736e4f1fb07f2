"""What a recipe is given, and what it makes: a sample, with as much haystack as fits."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

# a transformers tokenizer; loosely typed so that a stub will do
Tokenizer = Any

# makes haystack of so many units, which are lines or sentences
Filler = Callable[[int], list[str]]
# makes the sample with so many units of haystack
Sizing = Callable[[int], "Sample"]

# how a prediction is scored: by the share of the answers that it contains, by whether it contains any of them, or by
# the share of its lines that are right
ALL, ANY, LINES = SCORINGS = ("all", "any", "lines")


@dataclass(frozen=True)
class Question:
    """One question about a context, as the fields of `Sample`."""

    text: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    scoring: str = ALL


@dataclass(frozen=True)
class Sample:
    """One context with its question.

    answer_prefix: the first words of the answer, which the model is given. answers: what a right prediction contains.
    depth: where in the context the answers are, from 0 (start) to 1 (end), on average. scoring: one of SCORINGS.
    more: the questions that follow, of a sample that has several. instruction: how many letters of the context say what
    is to come, before the text itself.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float
    scoring: str = ALL
    more: tuple[Question, ...] = ()
    instruction: int = 0

    @property
    def questions(self) -> tuple[Question, ...]:
        """All its questions, in the order in which they are asked."""
        first = Question(self.question, self.answer_prefix, self.answers, self.max_new_tokens, self.scoring)
        return (first, *self.more)


@dataclass(frozen=True)
class Draw:
    """What decides a sample.

    random: its random numbers. depth: where its answer goes. text: of the essay. length: tokens asked for. questions:
    how many to ask. index: its number; order: a text from which whatever all samples share is drawn. documents: a file
    or folder of them. transcript: the most tokens of a transcript. count: of a text's tokens.
    """

    random: Random
    depth: float
    text: str = ""
    length: int = 0
    questions: int = 1
    index: int = 0
    order: str = ""
    documents: str | None = None
    transcript: int = 0
    count: Callable[[str], int] = len

    def depths(self, count: int) -> list[float]:
        """So many depths, the first of them the sample's own, the others anywhere."""
        return [self.depth, *(self.random.random() for _ in range(count - 1))]


@dataclass(frozen=True)
class Recipe:
    """A kind of sample.

    reads_text, reads_documents: it needs an essay's text, or documents. asks_several: it can ask several questions of
    one context. is_forced: the model is given the right answer token by token.
    """

    about: str
    build: Callable[[Draw], Sizing]
    reads_text: bool = False
    asks_several: bool = False
    reads_documents: bool = False
    is_forced: bool = False


def hide(filler: list[str], needles: list[tuple[float, str]], joint: str) -> str:
    """The filler with each needle inserted at its depth."""
    parts = list(filler)
    # deepest first, so that it does not move those before it
    for depth, needle in sorted(needles, reverse=True):
        parts.insert(round(depth * len(filler)), needle)
    return joint.join(parts)


def make_sample(head: str, body: str, questions: list[Question], depth: float | None = None) -> Sample:
    """The sample of a head, which instructs, and a body; its depth follows from where its answers are in the body."""
    first, *more = questions
    if depth is None:
        depths = [body.index(answer) / len(body) for answer in first.answers]
        depth = sum(depths) / len(depths)
    return Sample(
        head + body,
        first.text,
        first.answer_prefix,
        first.answers,
        first.max_new_tokens,
        depth,
        first.scoring,
        tuple(more),
        len(head),
    )
