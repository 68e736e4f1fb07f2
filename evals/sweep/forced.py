"""Tasks whose right answer is fed to the model, token by token: what would it have said at each place?"""

from collections.abc import Callable, Sequence
from typing import Any

from kvcompress.evals.sweep.points import Point
from kvcompress.evals.sweep.protocol import Measured, force
from kvcompress.evals.sweep.recipes.state_tracking import transcript
from kvcompress.evals.sweep.rows import mean_of, standard_error
from kvcompress.evals.sweep.samples import Prompt, Sample, Tokenizer
from kvcompress.evals.sweep.synthetic import SyntheticTask
from kvcompress.evals.sweep.task import Subject


class ForcedTask(SyntheticTask):
    """State tracking with the right answer given: the score is the share of the values that the model predicts."""

    def _ask(
        self, point: Point, subject: Subject, samples: Sequence[Sample], prompts: Sequence[Prompt], **how: Any
    ) -> tuple[list[Any], Measured]:
        given = [[token for token, _ in pieces(subject.tokenizer, sample)] for sample in samples]
        return force(subject.model, prompts=prompts, given=given, protocol=point.protocol, **how)

    def _scores(
        self, point: Point, tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return score_forced(tokenizer, samples, answers)


def pieces(tokenizer: Tokenizer, sample: Sample) -> list[tuple[int, bool | None]]:
    """The right answer's tokens, and of those of a value whether its step has changed it; None for all others."""
    return [
        (token, changed)
        for text, changed in transcript(sample)
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]


def score_forced(
    tokenizer: Tokenizer, samples: Sequence[Sample], predicted: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields about the predictions at each place of the right answers."""

    def shares(counts: Callable[[bool | None], bool]) -> list[float]:
        return [
            mean_of(
                [
                    float(said == token)
                    for (token, changed), said in zip(pieces(tokenizer, sample), each, strict=True)
                    if counts(changed)
                ]
            )
            for sample, each in zip(samples, predicted, strict=True)
        ]

    scores = shares(lambda changed: changed is not None)
    return (
        {
            "metric": "values predicted",
            "score": mean_of(scores),
            "stderr": standard_error(scores),
            "changed_score": mean_of(shares(lambda changed: changed is True)),
            "kept_score": mean_of(shares(lambda changed: changed is False)),
        },
        {"scores": scores, "transcript_tokens": [len(each) for each in predicted]},
    )
