"""Classes by the names that saved files give them: kvcompress's own by name alone, others with their module.

Nothing is imported for a file: a class of one's own must be there before.
"""

import sys
import warnings
from typing import TypeVar

from kvcompress.policies.method import is_own

Kind = TypeVar("Kind")


def class_name(kind: type) -> str:
    """What a file calls a class: `H2O`, `their_module:Mine`."""
    return kind.__name__ if is_own(kind) else f"{kind.__module__}:{kind.__qualname__}"


def is_named(kind: type, name: str) -> bool:
    """Whether a file's name may mean this class: its module may be another now, and older files give none."""
    _, colon, qualified = name.partition(":")
    return (not is_own(kind) and kind.__qualname__ == qualified) if colon else kind.__name__ == name


def class_named(base: type[Kind], name: str) -> type[Kind]:
    """The class derived from `base` that a file names; of a class that was defined again, the newest.

    Raises:
        ValueError: it is not imported.
    """
    kinds = _derived(base)
    module, colon, _ = name.partition(":")
    # one of ours before one of the same name in a file that gives no module
    alike = sorted((kind for kind in kinds if is_named(kind, name)), key=is_own)
    there = [kind for kind in alike if kind.__module__ == module] if colon else alike
    if not there and alike:
        warnings.warn(f"the file's {name} is read with {class_name(alike[-1])}", stacklevel=2)
        there = alike
    if not there:
        known = ", ".join(sorted({class_name(kind) for kind in kinds}))
        remedy = f"import {module}" if colon else "import the module that defines it"
        raise ValueError(f"the file's {base.__name__.lower()} {name!r} is not imported: {remedy} first; known: {known}")
    current = _found(there[-1])
    return current if current in there else there[-1]


def _found(kind: type[Kind]) -> type[Kind] | None:
    """What its module has under a class's name now."""
    found: type[Kind] | None = vars(sys.modules.get(kind.__module__, sys)).get(kind.__qualname__)
    return found


def _derived(kind: type[Kind]) -> list[type[Kind]]:
    """A class and all that derive from it, in the order in which they were defined."""
    below = [each for child in kind.__subclasses__() for each in _derived(child)]
    return [kind, *dict.fromkeys(below)]
