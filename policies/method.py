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
import re
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

# names that nobody else's method can have, though no policy has them: of caches that kvcompress/registry.py lists, of
# what a sweep or a check compares with them, and the word for all usual methods
RESERVED = frozenset({
    *("none", "dense", "full", "hydragen", "shadowkv", "gear", "kivi", "usual"),
    *("across", "swiftkv", "prefix", "dynamic", "quanto", "hqq", "fp8", "pyramidkv", "adakv", "criticalkv"),
})  # fmt: skip
_NAME = re.compile(r"[a-z0-9]([a-z0-9_.+-]*[a-z0-9+])?")


def register(name: str, about: str, **facts: Any) -> Callable[[Kind], Kind]:
    """Lists the class below it under a name; `facts` are fields of `Listed`.

    Raises:
        ValueError: a name that a spec or a table cannot hold, or that belongs to another class; or a policy without
            a score of its own.
        TypeError: no class, or a class that is neither a policy nor a cache.
    """
    names = (name, *facts.get("aliases", ()))
    for each in names:
        if not _NAME.fullmatch(each):
            raise ValueError(
                f"a method's name must be letters in lower case and digits, with any of '_.+-' within, got {each!r}"
            )

    def listing(kind: Kind) -> Kind:
        if not isinstance(kind, type) or not (issubclass(kind, Policy) or hasattr(kind, "get_seq_length")):
            raise TypeError(f"{name!r} must be a Policy or a CompressedCache, got {kind!r}")
        if issubclass(kind, Policy) and kind.score is Policy.score:
            raise ValueError(f"the policy {_path(kind)} must define score(candidates), which says what to keep")
        for each in names:
            _check_free(each, kind)
        LISTED[name] = describe(name, about, kind, **facts)
        return kind

    return listing


def _check_free(name: str, kind: type[Any]) -> None:
    """Raises ValueError if another class than this one has the name."""
    if not is_own(kind):
        # ours come first, whoever registers first
        import_policies()
        if name in RESERVED:
            raise ValueError(f"the name {name!r} is kvcompress's own; register {_path(kind)} under another one")
    for each in LISTED.values():
        # a cell of a notebook may run twice
        if name in (each.name, *each.aliases) and _path(each.kind) != _path(kind):
            raise ValueError(
                f"the name {name!r} belongs to {_path(each.kind)}; register {_path(kind)} under another one"
            )


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


def is_own(kind: type[Any] | None) -> bool:
    """Whether a class is kvcompress's own."""
    return kind is not None and kind.__module__.partition(".")[0] == "kvcompress"


def _path(kind: type[Any] | None) -> str:
    return "no class" if kind is None else f"{kind.__module__}.{kind.__qualname__}"
