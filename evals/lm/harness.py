"""The one way into lm-eval: its tasks, found here, in the user's folders or in its own index, run by a CompressedLM."""

import contextlib
import functools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from kvcompress.evals.lm.model import CompressedLM
from kvcompress.evals.sweep.samples import RECIPES
from kvcompress.evals.sweep.text import TEXT
from kvcompress.policies.settings import nearest

# task files for the user's own data
TASKS = Path(__file__).parent / "tasks"
# with which lm-eval draws examples, and seeds NumPy and torch
_SEED = 1234


@dataclass(frozen=True)
class Scored:
    """A task's results: all of its metrics, the main one, and the main one of each document in order.

    The main metric is the accuracy if the task has one, else its first metric.
    """

    metric: str
    score: float
    higher_is_better: bool
    metrics: dict[str, float]
    scores: list[Any]


def evaluate(lm: CompressedLM, name: str, metadata: str, num_fewshot: int | None, limit: int | None) -> Scored:
    """Runs one task. metadata: for the task files, as JSON.

    As lm-eval's simple_evaluate, which would also ask pip and the compilers about the machine, seconds for each point.
    """
    with errors_only():
        loaded = find_manager(name, metadata).load([name])
        set_examples(loaded["tasks"][name], num_fewshot)
        # its own seeds
        random.seed(0)
        numpy.random.seed(_SEED)
        torch.manual_seed(_SEED)
        run = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    found = run["results"][name]
    metrics = {key: value for key, value in found.items() if "," in key and "_stderr" not in key}
    chosen = next((key for key in metrics if key.startswith("acc,")), next(iter(metrics)))
    metric, _, kind = chosen.partition(",")
    samples = [sample for sample in run["samples"][name] if sample["filter"] == kind]
    scores = [sample[metric] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return Scored(metric, metrics[chosen], run["higher_is_better"][name].get(metric) is not False, metrics, scores)


def set_examples(task: Any, num_fewshot: int | None) -> None:
    """Lets a task draw so many examples, as lm-eval does: None for its own number. A task that says 0 keeps to that."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEED)


class _Tasks(TaskManager):
    """lm-eval's, which says in one line what is in the way of a task."""

    def load(self, names: Any) -> Any:
        """Raises ValueError if a task cannot be loaded, for want of a network or of its data."""
        try:
            return super().load(names)
        except Exception as error:
            reason = " ".join(str(error).split())
            offline = [f"local_{name}" for name in names if f"local_{name}" in _manager(False, "{}").all_subtasks]
            remedy = (
                f'; without a network, --tasks {",".join(offline)} --metadata \'{{"data": "/folder"}}\' reads the '
                "documents from a folder"
            ) * bool(offline)
            raise ValueError(
                f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {reason}{remedy}"
            ) from error


def find_tasks(names: Sequence[str], metadata: dict[str, Any], folder: Path | None) -> tuple[TaskManager, list[str]]:
    """The manager that knows all of these tasks, groups and tags, and their names, patterns such as mmlu_* expanded.

    Args:
        metadata: for the task files.
        folder: with more task files; None for those here and lm-eval's own.

    Raises:
        ValueError: a name that nobody knows, or a folder that is none.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with task files")
    places = [str(TASKS), *([] if folder is None else [str(folder)])]
    for defaults in (False, True):
        with errors_only():
            manager = _Tasks(include_path=places, include_defaults=defaults, metadata=metadata)
        found = {name: manager.match_tasks([name]) for name in names}
        if all(found.values()):
            return manager, list(dict.fromkeys(task for tasks in found.values() for task in tasks))
    unknown = next(name for name in names if not found[name])
    near = nearest(unknown, manager.task_index)
    raise ValueError(f"unknown task {unknown!r}; {near}`lm_eval ls tasks` lists all of lm-eval's")


def run(
    lm: CompressedLM, names: Sequence[str], manager: TaskManager, folder: Path | None, samples: bool, **options: Any
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` gives of these tasks, written as its own command writes it.

    Args:
        names: tasks, groups and tags that the manager knows.
        folder: for the results; None: they are not written.
        samples: write every document's answer too.
        options: others of simple_evaluate: num_fewshot, limit, gen_kwargs, ...

    Raises:
        ValueError: a task cannot be loaded, or asks for what the model or the cache cannot do.
        OSError: the results cannot be written.
    """
    tracker = None if folder is None else EvaluationTracker(output_path=str(folder))
    with errors_only():
        found = lm_eval.simple_evaluate(
            model=lm,
            # which lm-eval writes down: the model is there
            model_args={"pretrained": lm.name, "cache": lm.cache, "budget": lm.budget},
            tasks=list(names),
            task_manager=manager,
            batch_size=lm.batch_size,
            device=str(lm.device),
            log_samples=samples,
            evaluation_tracker=tracker,
            **options,
        )
        if found is None:
            # another process than the first has nothing to tell
            return {}
        documents = found.pop("samples", {})
        if tracker is not None and folder is not None:
            tracker.save_results_aggregated(results=found, samples=documents or None)
            for name, answers in documents.items():
                tracker.save_results_samples(task_name=name, samples=answers)
            _check_written(folder, tracker.date_id, 1 + len(documents))
    return dict(found)


def _check_written(folder: Path, date: str | None, count: int) -> None:
    """
    Raises:
        OSError: there are not so many files of this date, as lm-eval only warns of one that it cannot write.
    """
    place = folder.parent if folder.suffix == ".json" else folder
    written = [] if date is None else list(place.rglob(f"*_{date}.json*"))
    if len(written) < count:
        raise OSError(f"lm-eval wrote {len(written)} of {count} files of results to {folder}")


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Hides lm-eval's notices, which it would repeat for each of a sweep's hundreds of points."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_task(name: str, metadata: str) -> Any:
    """A new task object of lm-eval.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        with errors_only():
            return find_manager(name, metadata).load([name])["tasks"][name]
    except Exception as error:
        raise ValueError(f"lm-eval cannot load the task {name}: {type(error).__name__}: {error}") from error


def members(name: str, metadata: str) -> list[str]:
    """The tasks of a group or a tag of lm-eval's, in its order, groups within it taken apart; a task's own name.

    Raises:
        ValueError: lm-eval does not know it, or it has members that have no name of their own.
    """
    manager = _manager(False, metadata)
    if name not in manager.task_index:
        manager = _manager(True, metadata)
    entry = manager.task_index.get(name)
    if entry is None:
        known = (*RECIPES, TEXT, *_manager(False, metadata).all_subtasks)
        near = nearest(name, [*known, *manager.task_index])
        raise ValueError(f"unknown task {name!r}; {near}known: {', '.join(known)}, and all of lm-eval's own")
    if name in manager.all_subtasks:
        return [name]
    within = sorted(entry.tags) if name in manager.all_tags else (entry.cfg or {}).get("task", [])
    if not within or not all(isinstance(member, str) and member in manager.task_index for member in within):
        raise ValueError(f"{name} is a group of lm-eval's whose members cannot be told apart by name: {within}")
    return list(dict.fromkeys(found for member in within for found in members(member, metadata)))


def find_manager(name: str, metadata: str) -> TaskManager:
    """The manager that knows the task: that of the files here, or else of lm-eval's whole index, which takes seconds.

    Raises:
        ValueError: neither knows it, or it is a group.
    """
    if members(name, metadata) != [name]:
        raise ValueError(f"{name} is a group of lm-eval's tasks, not one of them")
    manager = _manager(False, metadata)
    return manager if name in manager.all_subtasks else _manager(True, metadata)


@functools.cache
def _manager(defaults: bool, metadata: str) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=defaults, metadata=json.loads(metadata))
