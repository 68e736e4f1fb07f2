"""The tasks that a sweep's settings name: synthetic ones, plain text, or lm-eval's."""

from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.samples import RECIPES
from kvcompress.evals.sweep.synthetic import SyntheticTask
from kvcompress.evals.sweep.task import Task
from kvcompress.evals.sweep.text import TEXT, TextTask

OWN: dict[str, type[SyntheticTask] | type[TextTask]] = {**dict.fromkeys(RECIPES, SyntheticTask), TEXT: TextTask}


def make_tasks(settings: Settings) -> dict[str, Task]:
    """The tasks by name, in the order in which they are first named.

    Raises:
        ValueError: an unknown name.
    """
    return {name: _make_task(name, settings) for name in dict.fromkeys(settings.tasks)}


def _make_task(name: str, settings: Settings) -> Task:
    if name in OWN:
        return OWN[name](name, settings)
    try:
        # lm-eval takes seconds to import, and is an extra
        from kvcompress.evals.lm.task import HarnessTask
    except ImportError as error:
        raise ValueError(
            f"unknown task {name!r}; known: {', '.join(OWN)}, and with pip install 'kvcompress[eval]' "
            f"those of lm-eval ({error})"
        ) from error
    return HarnessTask(name, settings)
