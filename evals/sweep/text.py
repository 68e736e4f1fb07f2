"""Plain text as a task of a sweep: how much a cache changes the model's predictions (agreement.py)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kvcompress.evals.sweep.agreement import FullReference, make_windows
from kvcompress.evals.sweep.points import CONTINUATION, Point, Settings, make_points
from kvcompress.evals.sweep.protocol import Measured
from kvcompress.evals.sweep.rows import held, mean_of, standard_error
from kvcompress.evals.sweep.samples import Tokenizer, read_text
from kvcompress.evals.sweep.synthetic import must_keep
from kvcompress.evals.sweep.task import PartedTask, Subject

# its name among tasks
TEXT = "text"


class TextTask(PartedTask):
    """Windows of a text: contexts of the requested lengths, and the tokens that follow them."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self._tokens: list[int] = []

    def points(self) -> list[Point]:
        return make_points(self.name, self.settings.lengths, [CONTINUATION], self.settings)

    def check(self, tokenizer: Tokenizer) -> None:
        for length in self.settings.lengths:
            self._windows(tokenizer, length)

    def cost(self, point: Point) -> int:
        settings = self.settings
        return settings.samples * (point.context + 40 * settings.continuation // settings.chunk)

    def facts(self, point: Point) -> dict[str, Any]:
        settings = self.settings
        return {
            "samples": settings.samples,
            "continuation": settings.continuation,
            "chunk": settings.chunk,
            "hold_back": 1,
            # rows of an older version lack attention errors
            "text_version": 2,
            "text": settings.text_hash,
        }

    def batch(self, point: Point, subject: Subject) -> int:
        return subject.batch(self.settings.batch, point.context)

    def parts(self, point: Point, subject: Subject) -> int:
        return math.ceil(self.settings.samples / self.batch(point, subject))

    def measure_part(self, point: Point, subject: Subject, part: int) -> dict[str, Any]:
        batch, length = self.batch(point, subject), point.context

        def prepare() -> FullReference:
            windows = self._windows(subject.tokenizer, length)[part * batch :][:batch]
            return FullReference(subject.model, windows, length)

        budget = self._budget(point)
        found, measured = subject.share("first forward", (self.name, length, part), prepare).compare(
            lambda: subject.build(point.method, subject.model, budget),
            chunk=self.settings.chunk,
            must_keep_at_most=must_keep(budget, length - 1),
        )
        return {"found": dataclasses.asdict(found), "measured": measured.facts()}

    def join(self, point: Point, parts: Sequence[dict[str, Any]], subject: Subject) -> dict[str, Any]:
        top1, kl, loss, full_loss, by_layer = (
            [value for part in parts for value in part["found"][name]]
            for name in ("top1", "kl", "loss", "full_loss", "attention_error")
        )
        errors = [mean_of(layers) for layers in by_layer]
        return {
            "metric": "top-1 agreement",
            "score": mean_of(top1),
            "stderr": standard_error(top1),
            "kl": mean_of(kl),
            "kl_stderr": standard_error(kl),
            "attention_error": mean_of(errors),
            "attention_error_stderr": standard_error(errors),
            "attention_error_by_layer": [round(mean_of(layer), 6) for layer in zip(*by_layer, strict=True)],
            "perplexity": math.exp(mean_of(loss)),
            "full_perplexity": math.exp(mean_of(full_loss)),
            "scores": top1,
            "kls": kl,
            "samples": len(top1),
        } | held([Measured(**part["measured"]) for part in parts], self._budget(point))

    def _budget(self, point: Point) -> int | None:
        return point.budget_tokens(point.context + self.settings.continuation)

    def _windows(self, tokenizer: Tokenizer, length: int) -> list[list[int]]:
        self._tokens = self._tokens or tokenizer.encode(
            read_text(self.settings.text), add_special_tokens=False, verbose=False
        )
        return make_windows(self._tokens, length, self.settings.continuation, self.settings.samples)
