"""The tasks that a sweep's settings name: synthetic ones, plain text, or lm-eval's."""

import json
from collections.abc import Sequence

from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.samples import RECIPES
from kvcompress.evals.sweep.synthetic import SyntheticTask
from kvcompress.evals.sweep.task import Task
from kvcompress.evals.sweep.text import TEXT, TextTask

OWN: dict[str, type[SyntheticTask] | type[TextTask]] = {**dict.fromkeys(RECIPES, SyntheticTask), TEXT: TextTask}


def make_tasks(settings: Settings) -> dict[str, Task]:
    """The tasks by name, in the order in which they are first named; of a group of lm-eval's, its members.

    Raises:
        ValueError: an unknown name.
    """
    made: dict[str, Task] = {}
    for name in dict.fromkeys(settings.tasks):
        found: Sequence[Task] = [OWN[name](name, settings)] if name in OWN else _harness_tasks(name, settings)
        for task in found:
            made.setdefault(task.name, task)
    return made


def _harness_tasks(name: str, settings: Settings) -> Sequence[Task]:
    try:
        # lm-eval takes seconds to import, and is an extra
        from kvcompress.evals.lm.harness import members
        from kvcompress.evals.lm.task import HarnessTask
    except ImportError as error:
        raise ValueError(
            f"unknown task {name!r}; known: {', '.join(OWN)}, and with pip install 'kvcompress[eval]' "
            f"those of lm-eval ({error})"
        ) from error
    return [HarnessTask(member, settings) for member in members(name, json.dumps(dict(settings.metadata)))]
