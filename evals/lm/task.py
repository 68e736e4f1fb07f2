"""lm-eval's tasks as tasks of a sweep: one task, one cache, its score and its bytes.

lm-eval makes the prompts and scores the answers as in `kvcompress eval`. What is read after compression follows the
sweep's protocols:

    question-agnostic   from where the question begins: the last example of a few-shot context, or a given text
    question-aware      the last `hold_back` tokens of the context

Rolling likelihoods have no question; their text is read in chunks, each with what is left of those before.
"""

import hashlib
import json
import math
from functools import cached_property
from typing import Any

from kvcompress.evals.lm.harness import errors_only, evaluate, find_manager, load_task, set_examples
from kvcompress.evals.lm.model import CompressedLM
from kvcompress.evals.sweep.points import CONTINUATION, Point, Settings, make_points, of_one_question
from kvcompress.evals.sweep.protocol import AWARE, NotCompressedError
from kvcompress.evals.sweep.rows import held, standard_error
from kvcompress.evals.sweep.samples import Tokenizer
from kvcompress.evals.sweep.task import Subject

# tokens read per forward after compression, the default of `kvcompress eval`
_CHUNK = 64


class HarnessTask:
    """A task of lm-eval's own or of the files here; it has its own contexts, whatever lengths are requested."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Raises ValueError if lm-eval has no such task, or it is a group of several."""
        self.name = name
        self.settings = settings
        self._metadata = json.dumps(dict(settings.metadata), sort_keys=True)
        find_manager(name, self._metadata)

    def points(self) -> list[Point]:
        asked = self.settings.protocols
        protocols = [CONTINUATION] if self._is_rolling else of_one_question(self.name, asked)
        for protocol in protocols:
            self._hold_back(protocol)
        return make_points(self.name, [None], protocols, self.settings)

    def check(self, tokenizer: Tokenizer) -> None:
        """Nothing is left to check: the points were made from lm-eval's own prompts."""

    def cost(self, point: Point) -> int:
        # a few hundred contexts of unknown length
        return (self.settings.limit or 500) * 500

    def facts(self, point: Point) -> dict[str, Any]:
        return {
            "num_fewshot": self._num_fewshot,
            "limit": self.settings.limit,
            "prompts": self._prompts,
            "hold_back": self._hold_back(point.protocol),
            "chunk": _CHUNK,
        }

    def measure(self, point: Point, subject: Subject) -> dict[str, Any]:
        """The standard error is that of a mean over documents, None for a score that is not a mean."""
        with errors_only():
            lm = CompressedLM(
                pretrained=subject.model,
                tokenizer=subject.tokenizer,
                cache=point.method,
                budget=point.budget,
                hold_back=self._hold_back(point.protocol),
                chunk=_CHUNK,
                batch_size=self.settings.batch,
            )
        found = evaluate(lm, self.name, self._metadata, self.settings.num_fewshot, self.settings.limit)
        if not lm.measured:
            raise NotCompressedError(
                f"nothing of {self.name}'s contexts was left to compress after holding back {lm.hold_back!r}; "
                "give it examples (--num-fewshot), or hold back less"
            )
        if not math.isfinite(found.score):
            raise ValueError(f"the {found.metric} of {self.name} is {found.score}")
        scores = found.scores
        is_mean = all(isinstance(value, int | float) for value in scores) and math.isclose(
            sum(scores) / len(scores), found.score, rel_tol=1e-6, abs_tol=1e-9
        )
        return {
            "metric": found.metric,
            "score": found.score,
            "stderr": standard_error(scores) if is_mean else None,
            "higher_is_better": found.higher_is_better,
            "metrics": {name: value if math.isfinite(value) else None for name, value in found.metrics.items()},
            "samples": len(scores),
            "scores": scores if is_mean else None,
        } | held(lm.measured, point.budget if isinstance(point.budget, int) else None)

    @cached_property
    def _task(self) -> Any:
        return load_task(self.name, self._metadata)

    @property
    def _is_rolling(self) -> bool:
        return bool(self._task.OUTPUT_TYPE == "loglikelihood_rolling")

    @property
    def _num_fewshot(self) -> int:
        asked, own = self.settings.num_fewshot, self._task.config.num_fewshot
        # as set_examples
        return int((own if asked is None or own == 0 else asked) or 0)

    def _hold_back(self, protocol: str) -> int | str:
        """How many tokens of a context are read after compression, or the text whose last occurrence begins them."""
        if protocol == AWARE:
            return self.settings.hold_back
        if self._is_rolling:
            return 1
        if self.settings.question is not None:
            return self.settings.question
        if not self._num_fewshot:
            raise ValueError(
                f"nothing marks where a question of {self.name} begins: ask for examples (--num-fewshot 5), give "
                "the text that it begins with (--question Question:), or use only the protocol question-aware"
            )
        return str(self._task.config.fewshot_delimiter)

    @cached_property
    def _prompts(self) -> str:
        """A hash of everything that lm-eval would ask."""
        task = load_task(self.name, self._metadata)
        with errors_only():
            set_examples(task, self.settings.num_fewshot)
            task.build_all_requests(limit=self.settings.limit)
        asked = [list(map(str, instance.arguments)) for instance in task.instances]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
