"""The synthetic tasks of samples.py, as tasks of a sweep."""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.points import Point, Settings, make_points, of_one_question
from kvcompress.evals.sweep.protocol import (
    AWARE,
    MULTI_TURN,
    SEVERAL,
    Measured,
    Reader,
    answer,
    answer_several,
    split,
)
from kvcompress.evals.sweep.recipes import state_tracking
from kvcompress.evals.sweep.recipes.documents import documents_file, documents_hash
from kvcompress.evals.sweep.recipes.recipe import ALL, ANY, LINES
from kvcompress.evals.sweep.rows import held, mean_of, standard_error
from kvcompress.evals.sweep.samples import RECIPES, Prompt, Sample, Tokenizer, make_prompt, make_samples, score_answer
from kvcompress.evals.sweep.task import PartedTask, Subject

# what scores are called
_METRICS = {ALL: "answers found", ANY: "answers found", LINES: "lines right"}


class SyntheticTask(PartedTask):
    """One of RECIPES: contexts of the requested lengths, whose answers are searched in what the model says."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings

    def points(self) -> list[Point]:
        if RECIPES[self.name].reads_documents:
            documents_file(self.name, self.settings.documents)
        return make_points(self.name, self.settings.lengths, self._protocols(), self.settings)

    def _protocols(self) -> Sequence[str]:
        asked = self.settings.protocols
        return asked if RECIPES[self.name].asks_several else of_one_question(self.name, asked)

    def check(self, tokenizer: Tokenizer) -> None:
        for length in dict.fromkeys(self.settings.lengths):
            for protocol in self._protocols():
                # samples of one file differ in what they need
                count = self.settings.samples if RECIPES[self.name].reads_documents else 1
                questions = self._questions(protocol)
                try:
                    prompt = make_prompt(tokenizer, self.samples(tokenizer, length, count, questions)[0])
                except ValueError as error:
                    if questions == 1:
                        raise
                    raise ValueError(f"{error}; {protocol} asks for {questions} answers in it (--turns)") from None
                split(prompt, protocol, self.settings.hold_back)

    def cost(self, point: Point) -> int:
        settings = self.settings
        answers = 400 * self._questions(point.protocol)
        if self.name in state_tracking.RECIPES:
            answers = 40 * min(settings.transcript, 3 * point.context)
        return settings.samples * (point.context + answers)

    def facts(self, point: Point) -> dict[str, Any]:
        settings = self.settings
        held_back = {"hold_back": settings.hold_back} if point.protocol in (AWARE, MULTI_TURN) else {}
        turns = {"turns": settings.turns} if point.protocol in SEVERAL else {}
        text = {"text": settings.text_hash} if RECIPES[self.name].reads_text else {}
        documents = (
            {"documents": documents_hash(self.name, settings.documents)} if RECIPES[self.name].reads_documents else {}
        )
        # the tokens of a transcript are no setting of other tasks
        transcript = {"transcript": settings.transcript} if self.name in state_tracking.RECIPES else {}
        return {"samples": settings.samples, **held_back, **turns, **text, **documents, **transcript}

    def samples(self, tokenizer: Tokenizer, length: int, count: int | None = None, questions: int = 1) -> list[Sample]:
        """The samples of a length, all of them or `count`."""
        settings = self.settings
        return make_samples(
            self.name,
            tokenizer,
            length,
            count or settings.samples,
            seed=settings.seed,
            text=settings.text,
            questions=questions,
            documents=settings.documents,
            transcript=settings.transcript,
        )

    def _questions(self, protocol: str) -> int:
        return self.settings.turns if protocol in SEVERAL else 1

    def batch(self, point: Point, subject: Subject) -> int:
        return subject.batch(self.settings.batch, point.context)

    def parts(self, point: Point, subject: Subject) -> int:
        return math.ceil(self.settings.samples / self.batch(point, subject))

    def measure_part(self, point: Point, subject: Subject, part: int) -> dict[str, Any]:
        samples, prompts, chosen = self._part(point, subject, part)
        asked = [prompts[index] for index in chosen]
        budget = self._budget(point, prompts)
        found, measured = self._ask(
            point,
            subject,
            [samples[index] for index in chosen],
            asked,
            make_cache=lambda: subject.build(point.method, subject.model, budget),
            hold_back=self.settings.hold_back,
            must_keep_at_most=must_keep(budget, min(len(prompt.context) for prompt in asked)),
            first=self._first_forward(point, subject, asked),
        )
        return {"answers": found, "measured": measured.facts()}

    def join(self, point: Point, parts: Sequence[dict[str, Any]], subject: Subject) -> dict[str, Any]:
        answers: dict[int, Any] = {}
        for number, part in enumerate(parts):
            samples, prompts, chosen = self._part(point, subject, number)
            answers.update(zip(chosen, part["answers"], strict=True))
        in_order = sorted(answers)
        scores, said = self._scores(
            point, subject.tokenizer, [samples[index] for index in in_order], [answers[index] for index in in_order]
        )
        measured = [Measured(**part["measured"]) for part in parts]
        memory = held(measured, self._budget(point, prompts)) | kept(measured)
        return scores | memory | said | {"samples": len(answers)}

    def _part(self, point: Point, subject: Subject, part: int) -> tuple[list[Sample], list[Prompt], list[int]]:
        """All samples and prompts of the point's length, and which of them are in a part."""
        questions, batch = self._questions(point.protocol), self.batch(point, subject)

        def prepare() -> tuple[list[Sample], list[Prompt]]:
            made = self.samples(subject.tokenizer, point.context, questions=questions)
            return made, [make_prompt(subject.tokenizer, sample) for sample in made]

        samples, prompts = subject.share("prompts", (self.name, point.length, questions), prepare)
        # at random, so that the first parts are like all; within a part, as they are made
        order = Random(f"{self.settings.seed}/parts").sample(range(len(prompts)), len(prompts))
        return samples, prompts, sorted(order[part * batch :][:batch])

    def _budget(self, point: Point, prompts: Sequence[Prompt]) -> int | None:
        return point.budget_tokens(max(prompt.tokens for prompt in prompts))

    def _ask(
        self, point: Point, subject: Subject, samples: Sequence[Sample], prompts: Sequence[Prompt], **how: Any
    ) -> tuple[list[Any], Measured]:
        """What the model answers to each of these prompts, and what the cache held. how: as `answer` takes it."""
        ask: Callable[..., tuple[list[Any], Measured]] = answer_several if point.protocol in SEVERAL else answer
        return ask(subject.model, prompts=prompts, protocol=point.protocol, stops=subject.stops, **how)

    def _scores(
        self, point: Point, tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A row's fields about these answers: their score, and what was said."""
        if point.protocol not in SEVERAL:
            return score_answers(tokenizer, samples, answers)
        # the first answer of a conversation is that of question-aware
        return score_turns(tokenizer, samples, answers, slice(1 if point.protocol == MULTI_TURN else 0, None))

    def _first_forward(self, point: Point, subject: Subject, prompts: Sequence[Prompt]) -> Callable[[Reader], None]:
        """The first forward of these prompts, which most caches share: the model runs it once for all."""
        rows = tuple(split(prompt, point.protocol, self.settings.hold_back)[0] for prompt in prompts)

        most = FirstForward.most_rows(subject.model, point.context)

        def first(reader: Reader) -> None:
            if FirstForward.serves(reader.cache) and len(rows) <= most:
                recorded = subject.share("first forward", rows, lambda: FirstForward(subject.model, rows))
                recorded.fill(reader)
            else:
                reader.read(rows)

        return first


def must_keep(budget: int | None, tokens: int) -> int | None:
    """The budget that a cache has to keep, if it is less than so many tokens."""
    return budget if budget is not None and budget < tokens else None


def kept(measured: Sequence[Measured]) -> dict[str, Any]:
    """A row's field about the parts of the prompts that were kept."""
    shares = Measured.mean(measured).kept_by_span
    return {"kept_by_span": shares and {name: round(share, 5) for name, share in shares.items()}}


def score_answers(
    tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields about the answers to samples: their score, and the answers themselves."""
    one_each = [[tokens] for tokens in answers]
    scores, said = score_turns(tokenizer, samples, one_each, slice(None))
    del scores["turn_scores"]
    for name in ("answers", "predictions"):
        said[name] = [first for (first,) in said[name]]
    return scores, said


def score_turns(
    tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Sequence[Sequence[int]]], counted: slice
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields about the answers to each sample's questions.

    Args:
        counted: which questions make the score; `turn_scores` has them all.
    """
    predictions = [[tokenizer.decode(tokens, skip_special_tokens=True) for tokens in each] for each in answers]
    found = [
        [score_answer(question, said) for question, said in zip(sample.questions, each, strict=True)]
        for sample, each in zip(samples, predictions, strict=True)
    ]
    scores = [mean_of(each[counted]) for each in found]
    by_turn = [mean_of(turn) for turn in zip(*found, strict=True)]
    return (
        {
            "metric": _METRICS[samples[0].scoring],
            "score": mean_of(scores),
            "stderr": standard_error(scores),
            "turn_scores": by_turn,
        },
        {
            "scores": scores,
            "depths": [round(sample.depth, 3) for sample in samples],
            "answers": [[list(question.answers) for question in sample.questions] for sample in samples],
            "predictions": predictions,
        },
    )
