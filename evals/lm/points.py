"""lm-eval's tasks as points of a sweep: one task, one cache, its score and its bytes.

The harness makes the prompts and scores the answers as in `kvcompress eval`. What is read after compression follows
the sweep's protocols:

    question-agnostic   from where the question begins: the last example of a few-shot context, or a text one names
    question-aware      the last `hold_back` tokens of the context

Rolling likelihoods have no question; their text is read in chunks, each through what its predecessors left.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from kvcompress.evals.lm.model import TASKS, CompressedLM
from kvcompress.evals.sweep.points import TEXT, Point, Settings
from kvcompress.evals.sweep.protocol import NotCompressedError
from kvcompress.evals.sweep.rows import held, standard_error
from kvcompress.evals.sweep.tasks import TASKS as OWN_TASKS
from kvcompress.evals.sweep.tasks import Tokenizer

# tokens read a forward after compression, as `kvcompress eval` does by default
_CHUNK = 64
_AWARE = "question-aware"


def check_name(name: str, settings: Settings) -> None:
    """Raises ValueError for what is no task of lm-eval's, or a group of several."""
    _manager_of(name, _text(settings))


def is_rolling(name: str, settings: Settings) -> bool:
    """True for a task of rolling likelihoods.

    Raises:
        ValueError: the task cannot be loaded, or nothing marks where its questions begin.
    """
    task = _load(name, _text(settings))
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return True
    for protocol in settings.protocols:
        _hold_back(task, protocol, settings)
    return False


def facts(point: Point, settings: Settings) -> dict[str, Any]:
    """What decides a point's result beside the model and the cache: the prompts themselves, and how they are read."""
    task = _load(point.task, _text(settings))
    return {
        "num_fewshot": _shots(task, settings),
        "limit": settings.limit,
        "prompts": _prompts(point.task, _text(settings), settings.num_fewshot, settings.limit),
        "hold_back": _hold_back(task, point.protocol, settings),
        "chunk": _CHUNK,
    }


def measure(model: PreTrainedModel, tokenizer: Tokenizer, point: Point, settings: Settings) -> dict[str, Any]:
    """The task's score with its standard error, all of its metrics, and the measured bytes of a sequence.

    The score is the accuracy where the task has one, else its first metric. Its standard error is that of a mean over
    documents, and None for a metric that is none.
    """
    task = _load(point.task, _text(settings))
    with _errors_only():
        lm = CompressedLM(
            pretrained=model,
            tokenizer=tokenizer,
            cache=point.method,
            budget=point.budget,
            hold_back=_hold_back(task, point.protocol, settings),
            chunk=_CHUNK,
            batch_size=settings.batch,
        )
    with _errors_only():
        run = simple_evaluate(
            model=lm,
            tasks=[point.task],
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=_manager_of(point.task, _text(settings)),
            bootstrap_iters=0,
        )
    if not lm.measured:
        raise NotCompressedError(
            f"nothing of {point.task}'s contexts was left to compress once {lm.hold_back!r} was held back; "
            "give it examples (--num-fewshot), or hold back less"
        )
    found = run["results"][point.task]
    metrics = {name: value for name, value in found.items() if "," in name and "_stderr" not in name}
    chosen = _main_metric(metrics)
    metric, _, kind = chosen.partition(",")
    score = metrics[chosen]
    if not math.isfinite(score):
        raise ValueError(f"the {metric} of {point.task} is {score}")
    samples = [sample for sample in run["samples"][point.task] if sample["filter"] == kind]
    scores = [sample[metric] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    is_mean = all(isinstance(value, int | float) for value in scores) and math.isclose(
        sum(scores) / len(scores), score, rel_tol=1e-6, abs_tol=1e-9
    )
    return {
        "metric": metric,
        "score": score,
        "stderr": standard_error(scores) if is_mean else None,
        "higher_is_better": run["higher_is_better"][point.task].get(metric) is not False,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "samples": len(scores),
        "scores": scores if is_mean else None,
    } | held(lm.measured, point.budget if isinstance(point.budget, int) else None)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """The harness tells each point anew what it takes for granted; a sweep has hundreds."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _main_metric(metrics: dict[str, float]) -> str:
    return next((name for name in metrics if name.startswith("acc,")), next(iter(metrics)))


def _hold_back(task: Any, protocol: str, settings: Settings) -> int | str:
    """Tokens of a context that are read after compression, or the text from whose last occurrence on it is."""
    if protocol == _AWARE or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return settings.hold_back if protocol == _AWARE else 1
    if settings.question is not None:
        return settings.question
    if not _shots(task, settings):
        raise ValueError(
            f"nothing marks where a question of {task.config.task} begins: ask for examples (--num-fewshot 5), name "
            "a text that it begins with (--question Question:), or only the protocol question-aware"
        )
    return str(task.config.fewshot_delimiter)


def _shots(task: Any, settings: Settings) -> int:
    return int((settings.num_fewshot if settings.num_fewshot is not None else task.config.num_fewshot) or 0)


def _text(settings: Settings) -> str:
    """The metadata, as what a cache of functions takes."""
    return json.dumps(dict(settings.metadata), sort_keys=True)


@functools.cache
def _prompts(name: str, metadata: str, num_fewshot: int | None, limit: int | None) -> str:
    """A hash of all that the harness would ask."""
    with _errors_only():
        task = _manager_of(name, metadata).load([name])["tasks"][name]
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        # as simple_evaluate draws the examples
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(limit=limit)
    asked = [list(map(str, instance.arguments)) for instance in task.instances]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


@functools.cache
def _load(name: str, metadata: str) -> Any:
    try:
        with _errors_only():
            return _manager_of(name, metadata).load([name])["tasks"][name]
    except Exception as error:
        raise ValueError(f"lm-eval cannot load the task {name}: {type(error).__name__}: {error}") from error


def _manager_of(name: str, metadata: str) -> TaskManager:
    """Who knows the task: the files shipped here, or else the whole index of the harness, which takes seconds to read.

    Raises:
        ValueError: nobody does, or it is a group.
    """
    manager = _manager(False, metadata)
    if name not in manager.all_subtasks:
        manager = _manager(True, metadata)
    if name in manager.all_subtasks:
        return manager
    if name in manager.all_groups or name in manager.all_tags:
        raise ValueError(f"{name} is a group of lm-eval's tasks; name those of its members that you mean")
    known = ", ".join((*OWN_TASKS, TEXT, *_manager(False, metadata).all_subtasks))
    raise ValueError(f"unknown task {name!r}; known: {known}, and all of lm-eval's own")


@functools.cache
def _manager(defaults: bool, metadata: str) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=defaults, metadata=json.loads(metadata))
