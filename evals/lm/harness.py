"""The one way into lm-eval: its tasks, found here or in its own index, run through a CompressedLM, and its command."""

import contextlib
import functools
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy
import torch
from lm_eval._cli import HarnessCLI
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


def run_command(arguments: list[str]) -> None:
    """`lm_eval run --model kvcompress` with these arguments, also with the task files of this folder."""
    if "--include_path" not in arguments:
        arguments = [*arguments, "--include_path", str(TASKS)]
    harness = HarnessCLI()
    harness.execute(harness._parser.parse_args(["run", "--model", "kvcompress", *arguments]))


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
