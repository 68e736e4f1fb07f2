"""Methods by name: what a policy or a cache tells the command line, README's table and the tests about itself.

    @register("tova", "what the newest query attends to", costs="sums of one query", paper="2401.06104")
    @dataclass(frozen=True, kw_only=True)
    class TOVA(Policy): ...

This is all that makes `tova` known to every `--methods` and `--cache`. Policies in this folder are found by
`import_policies`, those of other packages by the entry point group `kvcompress.methods` (kvcompress/registry.py).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kvcompress.policies.policy import Policy

Kind = TypeVar("Kind", bound=type)


@dataclass(frozen=True)
class Listed:
    """A method that has a name.

    about: what it keeps, in a few words. costs: what that takes apart from memory. paper: its arXiv id.
    kind: a Policy, which an EvictingCache follows, or a cache; None for what is only built like one.
    label: how a user writes it, where that is not the class's name.
    takes_budget: False for what keeps every token and takes no budget. reads_budget: it keeps every token, and its
        budget counts those that a step reads.
    usual: a sweep measures it unless told otherwise.
    aliases: other names of it, in lower case.
    tried: for settings of its own, values that make sense on a few dozen tokens: the contract's tests take the first
        of each, the fuzzer any.
    """

    name: str
    about: str
    costs: str = field(default="", kw_only=True)
    paper: str = field(default="", kw_only=True)
    kind: type[Any] | None = field(default=None, kw_only=True)
    label: str = field(default="", kw_only=True)
    takes_budget: bool = field(default=True, kw_only=True)
    reads_budget: bool = field(default=False, kw_only=True)
    usual: bool = field(default=True, kw_only=True)
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    tried: Mapping[str, Sequence[Any]] = field(default_factory=dict, kw_only=True)


LISTED: dict[str, Listed] = {}


def register(name: str, about: str, **facts: Any) -> Callable[[Kind], Kind]:
    """Lists the class below it under a name; `facts` are fields of `Listed`.

    Raises:
        ValueError: the name contains a character that has a meaning in a spec, or belongs to another class.
    """
    if name != name.lower() or set(name) & set(":=, "):
        raise ValueError(f"a method's name must be in lower case, without any of ':=, ', got {name!r}")

    def listing(kind: Kind) -> Kind:
        there = LISTED.get(name)
        # a cell of a notebook may run twice
        if there is not None and _path(there.kind) != _path(kind):
            raise ValueError(
                f"the name {name!r} belongs to {_path(there.kind)}; register {_path(kind)} under another one"
            )
        LISTED[name] = describe(name, about, kind, **facts)
        return kind

    return listing


def describe(name: str, about: str, kind: type[Any], **facts: Any) -> Listed:
    """A class under a name; label and takes_budget follow from the class, unless `facts` say otherwise."""
    is_policy = issubclass(kind, Policy)
    facts.setdefault("label", f"EvictingCache(policy={kind.__name__}())" if is_policy else kind.__name__)
    facts.setdefault("takes_budget", is_policy or "budget" in inspect.signature(kind).parameters)
    return Listed(name, about, kind=kind, **facts)


def import_policies() -> None:
    """Imports every module of this folder, so that what they register is listed."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")


def own_policies() -> list[type[Policy]]:
    """The policies that the modules of this folder register."""
    import_policies()
    kinds = [each.kind for each in LISTED.values() if each.kind is not None and issubclass(each.kind, Policy)]
    return [kind for kind in kinds if kind.__module__.startswith(f"{__package__}.")]


def _path(kind: type[Any] | None) -> str:
    return "no class" if kind is None else f"{kind.__module__}.{kind.__qualname__}"
