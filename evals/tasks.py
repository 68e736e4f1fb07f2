"""The tasks that a sweep's settings name: synthetic ones, plain text, or lm-eval's."""

import json
from collections.abc import Iterator, Sequence

from kvcompress.evals.sweep.forced import ForcedTask
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.samples import RECIPES, RULER, RULER_OFFLINE
from kvcompress.evals.sweep.synthetic import SyntheticTask
from kvcompress.evals.sweep.task import Task
from kvcompress.evals.sweep.text import TEXT, TextTask
from kvcompress.policies.settings import nearest

OWN: dict[str, type[SyntheticTask] | type[TextTask]] = {
    **{name: ForcedTask if recipe.is_forced else SyntheticTask for name, recipe in RECIPES.items()},
    TEXT: TextTask,
}


def make_tasks(settings: Settings) -> dict[str, Task]:
    """The tasks by name, in the order in which they are first named.

    "ruler" names all of RULER's that can be made, and a group of lm-eval's its members.

    Raises:
        ValueError: an unknown name.
    """
    made: dict[str, Task] = {}
    for name in dict.fromkeys(_expanded(settings)):
        found: Sequence[Task] = [OWN[name](name, settings)] if name in OWN else _harness_tasks(name, settings)
        for task in found:
            made.setdefault(task.name, task)
    return made


def _expanded(settings: Settings) -> Iterator[str]:
    """The names of tasks; "ruler" stands for RULER's: all thirteen if there are documents, else those without."""
    for name in settings.tasks:
        if name == "ruler":
            yield from RULER if settings.documents else RULER_OFFLINE
        else:
            yield name


def _harness_tasks(name: str, settings: Settings) -> Sequence[Task]:
    try:
        # lm-eval takes seconds to import, and is an extra
        from kvcompress.evals.lm.harness import members
        from kvcompress.evals.lm.task import HarnessTask
    except ImportError as error:
        raise ValueError(
            f"unknown task {name!r}; {nearest(name, OWN)}known: {', '.join(OWN)}, ruler for all of RULER, and with pip "
            f"install 'kvcompress[eval]' those of lm-eval ({error})"
        ) from error
    return [HarnessTask(member, settings) for member in members(name, json.dumps(dict(settings.metadata)))]
