"""Synthetic long-context tasks, made from a seed: needles, key-value retrieval, variable tracking, RULER's tasks.

A sample is a context that hides the answer and a question that asks for it. They are kept apart, because there are two
protocols: a cache compresses the context before it has seen the question, or after. `recipes/` has the kinds of samples
there are. Most are scored as RULER does (arXiv:2404.06654):

    score = the share of a sample's answers that the prediction contains, ignoring case

A sample depends only on the seed, the task, the length, its own number and how many there are, and with an essay or
documents on these.
"""

import bisect
import functools
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvcompress.evals.sweep.recipes import documents as about_documents
from kvcompress.evals.sweep.recipes import needles, ruler, state_tracking
from kvcompress.evals.sweep.recipes.haystack import prose, read_text
from kvcompress.evals.sweep.recipes.recipe import ANY, LINES, Draw, Question, Recipe, Sample, Sizing, Tokenizer
from kvcompress.evals.sweep.spans import Span, prompt_spans
from kvcompress.template import around_message, between_messages, has_template

__all__ = [
    "RECIPES",
    "RULER",
    "RULER_OFFLINE",
    "TRANSCRIPT",
    "Prompt",
    "Question",
    "Recipe",
    "Sample",
    "Tokenizer",
    "Turn",
    "make_prompt",
    "make_samples",
    "prose",
    "read_text",
    "score",
    "score_answer",
]

RECIPES: dict[str, Recipe] = {**needles.RECIPES, **ruler.RECIPES, **about_documents.RECIPES, **state_tracking.RECIPES}
# RULER's tasks that need no file, and all of them
RULER_OFFLINE, RULER = tuple(ruler.RECIPES), (*ruler.RECIPES, *about_documents.RECIPES)

# the most tokens of an answer to state tracking, unless told
TRANSCRIPT = 2048
# the day that chat templates are told: Llama's take a string, others call a function
_DATE = "26 Jul 2024"
_NOW = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%d %b %Y': '26 Jul 2024', '%B %d, %Y': 'July 26, 2024'}.get(format, '2024-07-26') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Turn:
    """A question after the first, in tokens.

    alone: asked right after the context. following: asked after the answer to another, as the next message of a
    conversation.
    """

    alone: tuple[int, ...]
    following: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A sample in tokens. The model reads the context, then the question with the answer's first words.

    more: the questions that follow, of a sample that has several. spans: its parts, in tokens.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    max_new_tokens: int
    more: tuple[Turn, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def tokens(self) -> int:
        """The most tokens that a conversation with it can take."""
        turns = sum(max(len(turn.alone), len(turn.following)) + turn.max_new_tokens for turn in self.more)
        return len(self.context) + len(self.question) + self.max_new_tokens + turns


def make_samples(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    samples: int,
    seed: int = 0,
    text: str | Path | None = None,
    *,
    questions: int = 1,
    documents: str | None = None,
    transcript: int = TRANSCRIPT,
) -> list[Sample]:
    """Samples whose contexts, with what the chat template puts before them, take at most `length` tokens.

    The depths of single answers are spread evenly over the samples.

    Args:
        task: one of RECIPES.
        text: a file for the essay haystack; by default Python's own manual.
        questions: how many to ask of each context.
        documents: a file of them, or a folder with RULER's files, for the tasks that ask about documents.
        transcript: the most tokens of an answer to state tracking.

    Raises:
        ValueError: an unknown task, a length that cannot hold it, documents that are missing, or a task that asks only
            one question of a context.
    """
    if task not in RECIPES:
        raise ValueError(f"task must be one of {', '.join(RECIPES)}, got {task!r}")
    recipe = RECIPES[task]
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if questions > 1 and not recipe.asks_several:
        several = ", ".join(name for name, each in RECIPES.items() if each.asks_several)
        raise ValueError(f"the task {task} asks one question of a context, got {questions}; {several} ask several")
    source = read_text(text) if recipe.reads_text else ""
    made = []
    for index in range(samples):
        draw = Draw(
            random=Random(f"{seed}/{task}/{length}/{index}"),
            depth=(index + 0.5) / samples,
            text=source,
            length=length,
            questions=questions,
            index=index,
            order=f"{seed}/{task}/order",
            documents=documents,
            transcript=transcript,
            count=lambda part: len(tokenizer.encode(part, add_special_tokens=False)),
        )
        made.append(_fit(task, tokenizer, length, recipe.build(draw)))
    return made


def make_prompt(tokenizer: Tokenizer, sample: Sample) -> Prompt:
    """The sample in tokens, as one user message of the model's chat template if it has one."""
    today = _today(tokenizer)
    head, tail = around_message(tokenizer, **today)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    def asked(question: Question) -> str:
        return question.text + tail + question.answer_prefix

    first, *others = sample.questions
    between = between_messages(tokenizer, **today) if others else ""
    more = tuple(
        Turn(encode(asked(each)), encode(between + asked(each).lstrip("\n")), each.max_new_tokens) for each in others
    )
    context, question = encode(head + sample.context), encode(asked(first))
    template, instruction = (len(encode(text)) for text in (head, head + sample.context[: sample.instruction]))
    spans = prompt_spans(template, instruction, len(context), len(context) + len(question))
    return Prompt(context, question, sample.max_new_tokens, more, spans)


def score(sample: Sample, prediction: str) -> float:
    """The score of an answer to a sample's first question, from 0 to 1."""
    return score_answer(sample.questions[0], prediction)


def score_answer(question: Question, prediction: str) -> float:
    """The share of the answers that the prediction contains; where any will do, whether it contains one; where they are
    lines, the share of its lines that are the right ones."""
    if question.scoring == LINES:
        # the first line goes on from the answer's first words
        lines = (question.answer_prefix.rsplit("\n")[-1] + prediction).splitlines()
        right = [line.strip() == answer for line, answer in zip(lines, question.answers, strict=False)]
        return sum(right) / len(question.answers)
    said = prediction.casefold()
    found = [answer.casefold() in said for answer in question.answers]
    return float(any(found)) if question.scoring == ANY else sum(found) / len(found)


def _today(tokenizer: Tokenizer) -> dict[str, str]:
    """What the chat template is told, if there is one: one day is today, so that a sweep that goes on tomorrow reads
    the same prompts."""
    if not has_template(tokenizer):
        return {}
    template = tokenizer.get_chat_template()
    return {"chat_template": _NOW + template if "strftime_now" in template else template, "date_string": _DATE}


def _fit(task: str, tokenizer: Tokenizer, length: int, sizing: Sizing) -> Sample:
    """The sample with the most haystack that stays within the length."""
    head, _ = around_message(tokenizer, **_today(tokenizer))

    @functools.cache
    def tokens(units: int) -> int:
        return len(tokenizer.encode(head + sizing(units).context, add_special_tokens=False))

    if tokens(1) > length:
        raise ValueError(f"length must be at least {tokens(1)} tokens for the task {task}, got {length}")
    most = 2
    # documents come to an end
    while tokens(most) <= length and tokens(most) > tokens(most // 2):
        most *= 2
    units = bisect.bisect_right(range(most), length, lo=1, key=tokens) - 1
    # more units may take fewer tokens, where their order changes
    while tokens(units) > length:
        units -= 1
    return sizing(units)
