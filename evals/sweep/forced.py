"""Tasks whose right answer is fed to the model, token by token: what would it have said at each place?"""

from collections.abc import Sequence
from typing import Any

from kvcompress.evals.sweep.points import Point
from kvcompress.evals.sweep.protocol import Measured, force
from kvcompress.evals.sweep.recipes.state_tracking import STATE, STEP, transcript
from kvcompress.evals.sweep.rows import mean_of, standard_error
from kvcompress.evals.sweep.samples import Prompt, Sample, Tokenizer
from kvcompress.evals.sweep.synthetic import SyntheticTask
from kvcompress.evals.sweep.task import Subject


class ForcedTask(SyntheticTask):
    """State tracking with the right answer given: scored by the steps and states that the model predicts."""

    def _ask(
        self, point: Point, subject: Subject, samples: Sequence[Sample], prompts: Sequence[Prompt], **how: Any
    ) -> tuple[list[Any], Measured]:
        given = [[token for token, _ in pieces(subject.tokenizer, sample)] for sample in samples]
        return force(subject.model, prompts=prompts, given=given, protocol=point.protocol, **how)

    def _scores(
        self, point: Point, tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return score_forced(tokenizer, samples, answers)


def pieces(tokenizer: Tokenizer, sample: Sample) -> list[tuple[int, str | None]]:
    """The right answer's tokens, each with what it belongs to: STEP, STATE, or None."""
    return [
        (token, kind) for text, kind in transcript(sample) for token in tokenizer.encode(text, add_special_tokens=False)
    ]


def score_forced(
    tokenizer: Tokenizer, samples: Sequence[Sample], predicted: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row's fields about the predictions at each place of the right answers."""

    def shares(*kinds: str) -> list[float]:
        return [
            mean_of(
                [
                    float(said == token)
                    for (token, kind), said in zip(pieces(tokenizer, sample), each, strict=True)
                    if kind in kinds
                ]
            )
            for sample, each in zip(samples, predicted, strict=True)
        ]

    scores = shares(STEP, STATE)
    return (
        {
            "metric": "steps predicted",
            "score": mean_of(scores),
            "stderr": standard_error(scores),
            "step_score": mean_of(shares(STEP)),
            "state_score": mean_of(shares(STATE)),
        },
        {"scores": scores, "transcript_tokens": [len(each) for each in predicted]},
    )
