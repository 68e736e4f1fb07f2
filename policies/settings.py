"""What a setting may be, by the type that it is declared with: an int, a choice of words, None; and what it is called.

A value of another type is refused before it can mean something else: the word "no" is true to Python, and half a
token kept is one.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, ParamSpec, Union

Arguments = ParamSpec("Arguments")

# names of parameters before 0.2: accepted in calls until 0.3; in saved files, specs and recorded rows always
RENAMED = {"rolled": "rerotated"}


def names_settings(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """An `__init__` that says which settings there are if it is given another, and takes those of RENAMED, with a
    warning, by their old names."""
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)

    @functools.wraps(init)
    def checked(*args: Arguments.args, **settings: Arguments.kwargs) -> None:
        for name in [name for name in settings if name not in known and not takes_all]:
            new = RENAMED.get(name)
            if new not in known:
                raise unknown_setting(type(args[0]), name, known)
            if new in settings:
                raise TypeError(f"{name} is the old name of {new}: pass {new} alone")
            settings[new] = settings.pop(name)
            warnings.warn(
                f"{name} is now called {new}, and will be removed in 0.3: write {new}={settings[new]!r}",
                FutureWarning,
                stacklevel=2,
            )
        init(*args, **settings)

    return checked


def unknown_setting(kind: type[Any], name: str, known: Iterable[str]) -> TypeError:
    """The error for a setting that a class does not have; known: the names of its parameters."""
    # the model is no setting
    return TypeError(f"{name} is no setting of {kind.__name__}; {instead(name, (n for n in known if n != 'model'))}")


def instead(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known settings: the one that is spelled most like it, and all."""
    names = list(known)
    near = nearest(name, names)
    return f"{near}{'It' if near else 'it'} takes {', '.join(names) or 'none'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A question for the known name that is spelled most like another one; empty if none is."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}? " if near else ""


def declared(kind: Callable[..., Any]) -> dict[str, Any]:
    """The types that a class, or a function, declares for its parameters; without those that cannot be found."""
    try:
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            return {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.init}
        return typing.get_type_hints(inspect.getattr_static(kind, "__init__") if isinstance(kind, type) else kind)
    except (NameError, AttributeError, TypeError):
        # a name that only a type checker imports: then nothing is known, and nothing refused
        return {}


def suits(value: Any, declared_as: Any) -> bool:
    """Whether a value is of a declared type; of a container, also what it contains. A bool is no number, NaN neither.

    A type that is not known here, such as a protocol, suits everything.
    """
    origin, parts = typing.get_origin(declared_as), typing.get_args(declared_as)
    if origin in (Union, types.UnionType):
        return any(suits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if declared_as is None or declared_as is types.NoneType:
        return value is None
    if declared_as in (int, float):
        is_number = isinstance(value, int if declared_as is int else int | float) and not isinstance(value, bool)
        return is_number and not math.isnan(value)
    if origin is tuple and isinstance(value, tuple):
        if parts[-1:] == (Ellipsis,):
            return all(suits(part, parts[0]) for part in value)
        return len(value) == len(parts) and all(map(suits, value, parts))
    kind = origin or declared_as
    try:
        return isinstance(value, kind)
    except TypeError:
        return True


def settled(value: Any, declared_as: Any) -> Any:
    """A value as Python writes it: NumPy's and torch's numbers become its own, and the list that JSON makes of a tuple
    is a tuple again, where one is declared."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        number = value.item()
        value = number if isinstance(number, bool | int | float) else value
    if type(value) in (tuple, list):
        parts = [settled(part, Any) for part in value]
        if any(map(operator.is_not, parts, value)):
            value = type(value)(parts)
    if isinstance(value, list) and not suits(value, declared_as) and suits(tuple(value), declared_as):
        value = tuple(value)
    return value


def settle(settings: Any) -> None:
    """Settles each field of a frozen dataclass.

    Raises:
        TypeError: a value is not of the type that its field declares.
        ValueError: it is none of the choices.
    """
    for name, declared_as in declared(type(settings)).items():
        given = getattr(settings, name)
        value = settled(given, declared_as)
        if not suits(value, declared_as):
            is_choice = typing.get_origin(declared_as) is Literal and isinstance(value, str)
            error: type[Exception] = ValueError if is_choice else TypeError
            raise error(f"{name} must be {spoken(declared_as)}, got {given!r}")
        if value is not given:
            object.__setattr__(settings, name, value)


def read(text: str, declared_as: Any = Any) -> Any:
    """A setting as a spec writes it: a number, true or false, none or a word, whichever is declared.

    Raises:
        ValueError: nothing that the text may mean suits.
    """
    words: dict[str, Any] = {"true": True, "false": False} | ({} if declared_as is Any else {"none": None})
    meanings: list[Any] = [words[text.lower()]] if text.lower() in words else []
    for number in (int, float):
        try:
            meanings.append(number(text))
        except ValueError:
            continue
    # a file by its name's ending, so that a choice of words that is misspelt is none
    meanings += [Path(text)] if Path(text).suffix else []
    for meaning in (*meanings, text):
        if declared_as is Any or suits(meaning, declared_as):
            return meaning
    raise ValueError(f"{spoken(declared_as)}, got {text!r}")


def spoken(declared_as: Any) -> str:
    """A declared type, for people."""
    parts = typing.get_args(declared_as)
    if typing.get_origin(declared_as) in (Union, types.UnionType):
        # a whole number is a number
        return _listed(dict.fromkeys(spoken(part) for part in parts if part is not int or float not in parts))
    if typing.get_origin(declared_as) is Literal:
        return _listed(map(repr, parts))
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        Path: "a file such as x.safetensors",
        types.NoneType: "none",
    }
    return names.get(declared_as) or str(getattr(declared_as, "__name__", declared_as)).removeprefix("typing.")


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
