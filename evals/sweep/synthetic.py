"""The synthetic tasks of samples.py, as tasks of a sweep."""

from collections.abc import Callable, Sequence
from typing import Any

from kvcompress.evals.sweep.first_forward import FirstForward
from kvcompress.evals.sweep.points import Point, Settings, make_points
from kvcompress.evals.sweep.protocol import AWARE, Measured, Reader, answer, split
from kvcompress.evals.sweep.recipes.documents import documents_file, documents_hash
from kvcompress.evals.sweep.rows import held, mean_of, standard_error
from kvcompress.evals.sweep.samples import RECIPES, Prompt, Sample, Tokenizer, make_prompt, make_samples, score
from kvcompress.evals.sweep.task import Subject

# how many bytes of first forwards to keep for the caches that share them
_MOST_RECORDED = 4 * 2**30


class SyntheticTask:
    """One of RECIPES: contexts of the requested lengths, whose answers are searched in what the model says."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings

    def points(self) -> list[Point]:
        if RECIPES[self.name].reads_documents:
            documents_file(self.name, self.settings.documents)
        return make_points(self.name, self.settings.lengths, self.settings.protocols, self.settings)

    def check(self, tokenizer: Tokenizer) -> None:
        for length in dict.fromkeys(self.settings.lengths):
            prompt = make_prompt(tokenizer, self.samples(tokenizer, length, 1)[0])
            for protocol in self.settings.protocols:
                split(prompt, protocol, self.settings.hold_back)

    def cost(self, point: Point) -> int:
        return self.settings.samples * (point.context + 400)

    def facts(self, point: Point) -> dict[str, Any]:
        settings = self.settings
        held_back = {"hold_back": settings.hold_back} if point.protocol == AWARE else {}
        text = {"text": settings.text_hash} if RECIPES[self.name].reads_text else {}
        documents = (
            {"documents": documents_hash(self.name, settings.documents)} if RECIPES[self.name].reads_documents else {}
        )
        return {"samples": settings.samples, **held_back, **text, **documents}

    def samples(self, tokenizer: Tokenizer, length: int, count: int | None = None) -> list[Sample]:
        """The samples of a length, all of them or `count`."""
        settings = self.settings
        return make_samples(
            self.name,
            tokenizer,
            length,
            count or settings.samples,
            seed=settings.seed,
            text=settings.text,
            documents=settings.documents,
        )

    def measure(self, point: Point, subject: Subject) -> dict[str, Any]:
        def prepare() -> tuple[list[Sample], list[Prompt]]:
            made = self.samples(subject.tokenizer, point.context)
            return made, [make_prompt(subject.tokenizer, sample) for sample in made]

        samples, prompts = subject.share("prompts", (self.name, point.length), prepare)
        budget = point.budget_tokens(max(len(p.context) + len(p.question) + p.max_new_tokens for p in prompts))
        # sequences of similar length need the least padding
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].context))
        answers: dict[int, list[int]] = {}
        measured: list[Measured] = []
        for first in range(0, len(order), self.settings.batch):
            chosen = order[first : first + self.settings.batch]
            asked = [prompts[index] for index in chosen]
            found, part = answer(
                subject.model,
                lambda: subject.build(point.method, subject.model, budget),
                asked,
                point.protocol,
                hold_back=self.settings.hold_back,
                stops=subject.stops,
                must_keep_at_most=must_keep(budget, min(len(prompt.context) for prompt in asked)),
                first=self._first_forward(point, subject, asked),
            )
            measured.append(part)
            answers.update(zip(chosen, found, strict=True))
        scores, said = score_answers(subject.tokenizer, samples, [answers[index] for index in range(len(samples))])
        return scores | held(measured, budget) | said

    def _first_forward(self, point: Point, subject: Subject, prompts: Sequence[Prompt]) -> Callable[[Reader], None]:
        """The first forward of these prompts, which evicting caches share: the model runs it once for all."""
        rows = tuple(split(prompt, point.protocol, self.settings.hold_back)[0] for prompt in prompts)
        fits = FirstForward.size(subject.model, max(map(len, rows)) * self.settings.samples) <= _MOST_RECORDED

        def first(reader: Reader) -> None:
            if not (fits and FirstForward.serves(reader.cache)):
                reader.read(rows)
                return
            known = subject.share("first forwards", (self.name, point.length, point.protocol), dict)
            if rows not in known:
                known[rows] = FirstForward(subject.model, rows)
            known[rows].fill(reader)

        return first


def must_keep(budget: int | None, tokens: int) -> int | None:
    """The budget that a cache has to keep, if it is less than so many tokens."""
    return budget if budget is not None and budget < tokens else None


def score_answers(
    tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields about the answers to samples: their score, and the answers themselves."""
    predictions = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    scores = [score(sample, said) for sample, said in zip(samples, predictions, strict=True)]
    return (
        {"metric": "answers found", "score": mean_of(scores), "stderr": standard_error(scores)},
        {
            "scores": scores,
            "depths": [round(sample.depth, 3) for sample in samples],
            "answers": [list(sample.answers) for sample in samples],
            "predictions": predictions,
        },
    )
