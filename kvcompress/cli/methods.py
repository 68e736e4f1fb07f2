"""The command methods: what each method keeps and costs, and what it can be told."""

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.arguments import KNOWN, show_table, user_errors

if TYPE_CHECKING:
    from kvcompress.registry import Method


def methods(
    method: Annotated[
        str | None, typer.Argument(help=f"Whose settings to show: h2o, or module:Class of your own. Known: {KNOWN}.")
    ] = None,
) -> None:
    """List the methods, or the settings of one: their types, defaults and meanings."""
    if method is None:
        _show_all()
        return
    from kvcompress.evals.sweep import baselines

    with user_errors():
        found, given = baselines.parse(method)
    _show_one(found, given)


def _show_all() -> None:
    from rich.table import Table

    from kvcompress.evals.sweep.baselines import BASELINES, SHARING
    from kvcompress.registry import METHODS, SPELLINGS

    table = Table()
    for name in ("name", "class", "keeps", "costs", "budget", "arXiv"):
        table.add_column(name)
    for name, found in METHODS.items():
        budget = "read per step" if found.reads_budget else "yes" if found.takes_budget else "no"
        table.add_row(name, _class(found.label), _plain(found.about), _plain(found.costs), budget, found.paper)
    for name, spec in SPELLINGS.items():
        table.add_row(name, "", f"{spec}, by another name", "", "yes", "")
    show_table(table)
    print("kvcompress methods NAME: what a method can be told, as in h2o:sinks=4")
    print(f"kvcompress sweep measures beside them: {', '.join([*BASELINES, *SHARING])}")


def _plain(words: str) -> str:
    """Without the marks that README's table has around names."""
    return words.replace("`", "")


def _class(label: str) -> str:
    """How a method's class is called: a policy's without the cache around it."""
    return re.sub(r"EvictingCache\(policy=(\w+)\(\)\)", r"policy \1", label)


def _show_one(method: "Method", given: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvcompress.policies.settings import spoken

    facts = {
        "keeps": _plain(method.about),
        "class": method.label,
        "costs": _plain(method.costs),
        "budget": _budget(method),
    }
    facts["paper"] = f"arXiv:{method.paper}" if method.paper else ""
    print(method.name)
    for name, value in facts.items():
        if value:
            print(f"{name:<8} {value}")
    if method.settings is None:
        print("settings are read by the class itself, and are known to nobody else")
        return
    defaults = {**_defaults(method), **given}
    meanings = _meanings(method)
    table = Table(title_justify="left")
    for name in ("setting", "takes", "default", "meaning"):
        table.add_column(name)
    for name, declared_as in method.settings.items():
        kind = "anything" if declared_as is Any else spoken(declared_as)
        default = _shown(defaults.get(name, inspect.Parameter.empty))
        # shapes are in brackets, which are no marks of style
        table.add_row(*map(escape, (name, kind, default, meanings.get(name, ""))))
    if not table.row_count:
        print("it has no settings")
        return
    show_table(table)
    if len(_sources(method)) > 1:
        print("bits, group_size, outliers, hadamard: any of them packs the tokens that stay; else they are not packed")


def _budget(method: "Method") -> str:
    if not method.takes_budget:
        return "none: every token stays"
    what = "selected in each step" if method.reads_budget else "kept"
    return f"tokens {what} per sequence and KV head (512), or a fraction of those seen (0.2)"


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "must be given"
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _sources(method: "Method") -> list[Any]:
    """The classes that its settings belong to, the first one's before those of the same name of others."""
    from kvcompress.caches.evicting import EvictingCache
    from kvcompress.policies.gear import GEAR
    from kvcompress.policies.policy import Policy

    assert method.kind is not None
    return [method.kind, *((EvictingCache, GEAR) if issubclass(method.kind, Policy) else ())]


def _defaults(method: "Method") -> dict[str, Any]:
    if method.defaults is not None:
        return dict(method.defaults)
    found: dict[str, Any] = {}
    for kind in reversed(_sources(method)):
        found |= {each.name: each.default for each in inspect.signature(kind).parameters.values()}
    return found


def _meanings(method: "Method") -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in reversed(_sources(method)):
        found |= explained(kind)
    if "preset" in (method.settings or ()):
        found["preset"] = f"what the others are unless given, by name: {', '.join(_presets())}"
    return found


def _presets() -> Iterable[str]:
    from kvcompress.policies.gear import PRESETS

    return PRESETS


@functools.cache
def explained(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a class say of its settings, by name.

    They say it as `name: words` or `name, name: words`, at the beginning of a line or a sentence, in the docstring of
    the class, of its `__init__`, or of those of the classes that it derives from, whichever comes first. `as in Class`
    stands for what that class's say.
    """
    inits = [vars(owner)["__init__"] for owner in kind.__mro__[:-1] if "__init__" in vars(owner)]
    known = "|".join({name: None for init in inits for name in inspect.signature(init).parameters})
    head = re.compile(rf"(?:^[ ]*|(?<=[.;]\s))((?:{known})(?:,\s+(?:{known}))*):\s+", re.MULTILINE)
    found: dict[str, str] = {}
    for owner in kind.__mro__ if known else ():
        for text in (owner.__doc__, getattr(vars(owner).get("__init__"), "__doc__", None)):
            # what stands before the first name, then names and words by turns
            _, *told = head.split(inspect.cleandoc(text or ""))
            for names, words in zip(told[::2], told[1::2], strict=True):
                # a blank line ends what is said of the last one
                said = " ".join(re.split(r"\n\s*\n", words)[0].split()).removesuffix(".")
                for name in re.split(r",\s+", names):
                    found.setdefault(name, said)
    return {name: _elsewhere(name, words) for name, words in found.items()}


def _elsewhere(name: str, words: str) -> str:
    """What another class says of a setting, where the words only name that class."""
    said = re.fullmatch(r"as in ([\w.]+)", words)
    if said is None:
        return words
    import kvcompress

    # a class that is not public is named with its module, which the class that names it has imported
    module, _, last = said[1].rpartition(".")
    other = getattr(sys.modules[module] if module else kvcompress, last)
    return explained(other).get(name, words)
