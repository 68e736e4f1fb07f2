"""Caches by name, for the command line, the sweep and the tests.

A method is written as `name` or as `name:setting=value:setting=value`, such as `h2o:sinks=4:recent=0.25`. One of your
own is written as the path of its class, `my_policies:MyPolicy:recent=8`, or by the name that an installed package gives
it in the entry point group `kvcompress.methods`. A `budget=0.3` among the settings overrides one given separately.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.caches.budget import Budget
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.evicting import RENAMED, EvictingCache
from kvcompress.caches.quantized import GEARCache, KIVICache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.policies.gear import GEAR
from kvcompress.policies.method import LISTED, Listed, describe, import_policies, register
from kvcompress.policies.policy import Policy
from kvcompress.prefix.cache import HydragenCache

FULL = "none"
FLOOR = "streaming"
# stands for every method whose `usual` is true
USUAL = "usual"
GROUP = "kvcompress.methods"


@dataclass(frozen=True)
class Method(Listed):
    """A method, and the function that builds its cache: (model, budget, settings) -> cache."""

    build: Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache] = field(kw_only=False)


def parse(spec: str, methods: Mapping[str, Listed] | None = None) -> tuple[Method, dict[str, Any]]:
    """The method and the settings that a spec names; `methods` are the known ones, by default METHODS.

    Raises:
        ValueError: an unknown method, a class that is not one, a part that is not `setting=value`, or a bad budget.
    """
    name, *pairs = spec.strip().split(":")
    methods = METHODS if methods is None else methods
    # also as papers and classes spell them: H2O, SnapKV
    lower = name.lower()
    method = methods.get(lower) or next((each for each in methods.values() if lower in each.aliases), None)
    if method is None and pairs and "=" not in pairs[0]:
        method = _of_class(name, pairs.pop(0))
    if method is None:
        raise ValueError(
            f"unknown method {name!r}; known: {', '.join(methods)}, or module:Class of your own, such as "
            "my_policies:MyPolicy"
        )
    settings: dict[str, Any] = {}
    for pair in pairs:
        setting, equals, value = pair.partition("=")
        if not (setting and equals and value):
            raise ValueError(f"settings must be written as {method.name}:setting=value, got {spec!r}")
        is_budget = method.takes_budget and setting == "budget"
        settings[RENAMED.get(setting, setting)] = Budget.parse(value).amount if is_budget else _value(value)
    return method if isinstance(method, Method) else _buildable(method), settings


def spelled(method: Listed, settings: Mapping[str, Any]) -> str:
    """The one way to write a method with these settings."""
    return ":".join([method.name, *(f"{name}={settings[name]}" for name in sorted(settings))])


def canonical(spec: str, methods: Mapping[str, Listed] | None = None) -> str:
    """The one way to write a spec."""
    return spelled(*parse(spec, methods))


def expanded(specs: Iterable[str]) -> tuple[str, ...]:
    """The specs, with every usual method in place of the word `usual`."""
    usual = [name for name, method in METHODS.items() if method.usual]
    return tuple(name for spec in specs for name in (usual if spec.strip().lower() == USUAL else [spec]))


def build(
    spec: str,
    model: PreTrainedModel,
    budget: int | float | None = None,
    methods: Mapping[str, Listed] | None = None,
) -> CompressedCache:
    """A new cache for the model.

    Args:
        spec: a method's name, with or without settings.
        budget: tokens kept per sequence and KV head, or as a float a fraction of those seen; ignored by methods that
            take none.
        methods: the known ones, by default METHODS.

    Raises:
        ValueError: an unknown method or setting, or a budget that is missing or out of range.
    """
    method, settings = parse(spec, methods)
    if method.takes_budget:
        budget = settings.pop("budget", budget)
        if budget is None:
            raise ValueError(f"the method {method.name} needs a budget: tokens to keep, or a fraction of those seen")
    with _errors_about_settings(method, settings):
        return method.build(model, 0 if budget is None else budget, settings)


def policy_of(method: Listed, settings: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The policy of an evicting method, and those of its settings that are the EvictingCache's, such as `packed`.

    Raises:
        ValueError: the method has no policy, or the policy no such setting.
    """
    if method.kind is None or not issubclass(method.kind, Policy):
        raise ValueError(f"the method {method.name} has no policy")
    own = dict(settings)
    of_cache: dict[str, Any] = {name: own.pop(name) for name in ("allocation", "rerotated") if name in own}
    of_codes = {name: own.pop(name) for name in ("bits", "group_size", "outliers") if name in own}
    if of_codes:
        of_cache["packed"] = GEAR(**of_codes)
    with _errors_about_settings(method, own):
        return method.kind(**own), of_cache


def _buildable(method: Listed) -> Method:
    kind = method.kind
    assert kind is not None

    def evicting(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        policy, of_cache = policy_of(method, settings)
        return EvictingCache(model, policy=policy, budget=budget, **of_cache)

    def cache(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        made: CompressedCache = kind(model, **settings, **({"budget": budget} if method.takes_budget else {}))
        return made

    return Method(**vars(method), build=evicting if issubclass(kind, Policy) else cache)


@contextlib.contextmanager
def _errors_about_settings(method: Listed, settings: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if settings and "argument" in str(error):
            known = [] if method.kind is None else list(inspect.signature(method.kind).parameters)
            taken = ", ".join(name for name in known if name not in ("model", "budget", "packed", "kwargs"))
            raise ValueError(
                f"the method {method.name} does not take these settings: {error}; it takes {taken or 'none'}"
            ) from None
        raise


def _of_class(module: str, name: str) -> Listed:
    """The method that a user's class is, under the name module:Class."""
    where = f"{module}:{name}"
    # `python -m kvcompress` would look there too
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"unknown method {where!r}; known: {', '.join(METHODS)}, and there is no module {module!r} on Python's "
            f"path or in {os.getcwd()}"
        ) from None
    if not _is_method(kind):
        raise ValueError(f"{where} must be a Policy or a CompressedCache, got {kind!r}")
    listed = next((each for each in LISTED.values() if each.kind is kind), None)
    return _described(where, kind) if listed is None else dataclasses.replace(listed, name=where)


def _is_method(found: Any) -> TypeGuard[type[Any]]:
    return isinstance(found, type) and issubclass(found, Policy | CompressedCache)


def _described(name: str, kind: type[Any]) -> Listed:
    return describe(name, (inspect.getdoc(kind) or kind.__name__).partition("\n")[0], kind)


def _import_installed() -> None:
    """Lists the methods of other packages; one that cannot be imported is skipped, with a warning."""
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            if _is_method(found) and found not in [each.kind for each in LISTED.values()]:
                register(point.name, _described(point.name, found).about)(found)
            elif not (_is_method(found) or inspect.ismodule(found)):
                raise TypeError(f"expected a Policy, a CompressedCache or a module that registers some, got {found!r}")
        except Exception as error:
            package = "an unknown package" if point.dist is None else point.dist.name
            warnings.warn(
                f"the method {point.name!r} of {package} ({GROUP}: {point.value}) is skipped: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _value(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _gear(name: str) -> Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache]:
    def gear(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        settings = {"preset": name, **settings}
        return GEARCache.preset(model, settings.pop("preset"), **settings)

    return gear


def _list_all() -> dict[str, Listed]:
    """Every method: those of this package by the date of their papers, then those that others installed."""
    import_policies()
    register("none", "every token", costs="the full cache: the ceiling, exact", usual=False, aliases=("dense", "full"))(
        DenseCache
    )
    register(
        "hydragen",
        "every token; shared ones (prefixes, trees) once",
        costs="one more attention and a merge per level; exact",
        paper="2402.05099",
        usual=False,
        takes_budget=False,
    )(HydragenCache)
    register(
        "shadowkv",
        "everything: low-rank keys, values in host memory or a file; reads selected chunks",
        costs="one factorisation per prompt, values fetched each step",
        paper="2410.21465",
        usual=False,
        reads_budget=True,
    )(ShadowKVCache)
    for method in (
        Method(
            "gear", "every token: keys in 4 bits, values in 3; or 2, 3, 8 bits, outliers, low rank", _gear("default"),
            costs="packing once, unpacking where attention reads", paper="2403.05527",
            kind=GEARCache, label="GEARCache", takes_budget=False,
        ),
        Method(
            "kivi", "every token, 2-bit codes", _gear("kivi"),
            costs="as `gear`", paper="2402.02750", kind=KIVICache, label="KIVICache", takes_budget=False,
        ),
    ):  # fmt: skip
        LISTED[method.name] = method
    ordered = sorted(LISTED.values(), key=lambda each: (each.paper, each.name))
    LISTED.clear()
    LISTED.update({each.name: each for each in ordered})
    _import_installed()
    return LISTED


METHODS = _list_all()
