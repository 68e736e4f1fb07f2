"""Caches by name, for the command line, the sweep and the tests.

A method is written as `name` or as `name:setting=value:setting=value`, such as `h2o:sinks=4:recent=0.25`. One of your
own is written as the path of its class, `my_policies:MyPolicy:recent=8`, or by the name that an installed package gives
it in the entry point group `kvcompress.methods`. A `budget=0.3` among the settings overrides one given separately.
"""

import dataclasses
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.caches.budget import Allocation, Budget
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.profile import Profile
from kvcompress.caches.quantized import GEARCache, KIVICache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.policies.gear import GEAR, PRESETS
from kvcompress.policies.method import LISTED, Listed, describe, import_policies, is_own, register
from kvcompress.policies.policy import Policy
from kvcompress.policies.settings import RENAMED, declared, instead, nearest, read
from kvcompress.prefix.cache import HydragenCache

FULL = "none"
FLOOR = "streaming"
# stands for every method whose `usual` is true
USUAL = "usual"
GROUP = "kvcompress.methods"


# what papers call a policy whose budget is shared in another way
SPELLINGS = {
    "pyramidkv": "snapkv:allocation=pyramid",
    "adakv": "snapkv:allocation=heads",
    "criticalkv": "snapkv:second_stage=0.5",
}

# what a spec may set of an evicting cache, beside its policy's own settings; a file is a Profile's
_OF_CACHE: dict[str, Any] = {"allocation": Allocation | Path, "rerotated": bool}
_OF_CODES = {name: declared(GEAR)[name] for name in ("bits", "group_size", "outliers", "hadamard")}
# KIVI is one of GEAR's presets, and quantises each channel of keys by itself
_OF_KIVI = declared(GEAR)
_OF_GEAR = {"preset": str, "basis": str, **_OF_KIVI}


@dataclass(frozen=True)
class Method(Listed):
    """A method, and the function that builds its cache: (model, budget, settings) -> cache.

    settings: what a spec may set, with the types that are declared; None where that is not known. defaults: what they
    are unless they are set; None: as the signatures of the classes say.
    """

    build: Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache] = field(kw_only=False)
    settings: Mapping[str, Any] | None = field(default=None, kw_only=True)
    defaults: Mapping[str, Any] | None = field(default=None, kw_only=True)


def names() -> list[str]:
    """Every name that `parse` knows: of the methods, and of other papers' settings of them."""
    return [*METHODS, *SPELLINGS]


def parse(spec: str, methods: Mapping[str, Listed] | None = None) -> tuple[Method, dict[str, Any]]:
    """The method and the settings that a spec names; `methods` are the known ones, by default METHODS.

    Raises:
        ValueError: an unknown method, a class that is not one, a part that is not `setting=value`, a setting that the
            method does not have or that is given twice, a value of another type than the setting's, or a bad budget.
        TypeError: the spec is no str.
    """
    if not isinstance(spec, str):
        raise TypeError(f"a method must be named by a str such as 'h2o:sinks=4', got {spec!r}")
    # a colon ends a value only where another setting begins: host=mmap:/folder is one
    head, *pairs = re.split(r":(?=\w+=)", spec.strip())
    if head.lower() in SPELLINGS:
        return parse(":".join([SPELLINGS[head.lower()], *pairs]), methods)
    name, colon, of_module = head.partition(":")
    methods = METHODS if methods is None else methods
    # also as papers and classes spell them: H2O, SnapKV
    lower = name.lower()
    listed = methods.get(lower) or next((each for each in methods.values() if lower in each.aliases), None)
    if listed is None and of_module:
        listed = _of_class(name, of_module)
    elif listed is None:
        known = [*methods, *SPELLINGS]
        raise ValueError(
            f"unknown method {name!r}; {nearest(name, known)}known: {', '.join(known)}, or module:Class of your own, "
            "such as my_policies:MyPolicy"
        )
    elif colon:
        raise ValueError(f"settings must be written as {listed.name}:setting=value, got {spec!r}")
    method = listed if isinstance(listed, Method) else _buildable(listed)
    settings: dict[str, Any] = {}
    for pair in pairs:
        setting, _, text = pair.partition("=")
        if method.settings is None or setting not in method.settings:
            setting = RENAMED.get(setting, setting)
        if not text:
            raise ValueError(f"settings must be written as {method.name}:setting=value, got {spec!r}")
        if setting in settings:
            raise ValueError(f"{setting} must be given once, got {spec!r}")
        is_budget = method.takes_budget and setting == "budget"
        settings[setting] = Budget.parse(text).amount if is_budget else _value(method, setting, text)
    return method, settings


def _value(method: Method, setting: str, text: str) -> Any:
    known = method.settings
    if known is None:
        return read(text)
    if setting not in known:
        takes = [*(["budget"] if method.takes_budget else []), *known]
        raise ValueError(f"the method {method.name} does not take these settings: {setting}; {instead(setting, takes)}")
    try:
        return read(text, known[setting])
    except ValueError as error:
        raise ValueError(f"the method {method.name} takes as {setting} {error}") from None


def spelled(method: Listed, settings: Mapping[str, Any]) -> str:
    """The one way to write a method with these settings."""
    return ":".join([method.name, *(f"{name}={settings[name]}" for name in sorted(settings))])


def refuse_budget(method: Listed, named: str, budget: int | float | None, option: str = "budget") -> None:
    """Raises ValueError if a budget is given to a method that takes none; named, option: as the message calls them."""
    if budget is not None and not method.takes_budget:
        raise ValueError(f"{named} takes no {option}: leave it out; got {budget}")


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
        ValueError: an unknown method or setting, one that is missing, or a budget that is missing or out of range.
    """
    method, settings = parse(spec, methods)
    if method.takes_budget:
        budget = settings.pop("budget", budget)
        if budget is None:
            raise ValueError(f"the method {method.name} needs a budget: tokens to keep, or a fraction of those seen")
    _check_complete(method, settings)
    try:
        return method.build(model, 0 if budget is None else budget, settings)
    except TypeError as error:
        if method.settings is not None or not settings:
            raise
        # which settings there are is known to nobody but the function that builds it
        given = ", ".join(settings)
        raise ValueError(f"the method {method.name} does not take these settings: {given} ({error})") from error


def policy_of(method: Listed, settings: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The policy of an evicting method, and those of its settings that are the EvictingCache's, such as `packed`.

    Raises:
        ValueError: the method has no policy, the policy needs a setting that is missing, or has one that the cache
            has too, or the file of a profile is none.
        OSError: the file of a profile cannot be read.
    """
    if method.kind is None or not issubclass(method.kind, Policy):
        raise ValueError(f"the method {method.name} has no policy")
    _check_complete(method, settings)
    own = dict(settings)
    of_cache: dict[str, Any] = {name: own.pop(name) for name in _OF_CACHE if name in own}
    if isinstance(of_cache.get("allocation"), Path):
        of_cache["allocation"] = Profile.load(of_cache["allocation"])
    of_codes = {name: own.pop(name) for name in _OF_CODES if name in own}
    if of_codes:
        of_cache["packed"] = GEAR(**of_codes)
    return method.kind(**own), of_cache


def _check_complete(method: Listed, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where settings do not say all that the method needs, or say what two may have meant."""
    if method.kind is None:
        return
    parameters = inspect.signature(method.kind).parameters.values()
    if issubclass(method.kind, Policy):
        twice = {each.name for each in parameters} & {*_OF_CACHE, *_OF_CODES, "budget"} & settings.keys()
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} may be {method.kind.__name__}'s or the cache's: give the policy's setting "
                "another name, or build an EvictingCache with it in Python"
            )
    wanted = [each.name for each in parameters if each.default is each.empty and each.kind is each.KEYWORD_ONLY]
    missing = [name for name in wanted if name not in ("budget", *settings)]
    if missing:
        raise ValueError(f"the method {method.name} needs {', '.join(missing)}: {method.name}:{missing[0]}=...")


def _buildable(method: Listed) -> Method:
    kind = method.kind
    assert kind is not None

    def evicting(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        policy, of_cache = policy_of(method, settings)
        return EvictingCache(model, policy=policy, budget=budget, **of_cache)

    def cache(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        made: CompressedCache = kind(model, **settings, **({"budget": budget} if method.takes_budget else {}))
        return made

    parameters, known = inspect.signature(kind).parameters, declared(kind)
    settings = {name: known.get(name, Any) for name in parameters if name not in ("model", "budget", "packed", "pin")}
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return Method(**vars(method), build=cache)
    if not issubclass(kind, Policy):
        return Method(**vars(method), build=cache, settings=settings)
    return Method(**vars(method), build=evicting, settings=settings | _OF_CACHE | _OF_CODES)


def _of_class(module: str, name: str) -> Listed:
    """The method that a user's class is, under the name module:Class."""
    where = f"{module}:{name}"
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"a class of your own must be written as module:Class, such as my_policies:MyPolicy, got {where!r}"
        )
    # `python -m kvcompress` would look there too
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        kind: Any = importlib.import_module(module)
        for part in name.split("."):
            kind = getattr(kind, part, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"unknown method {where!r}; known: {', '.join(names())}, and there is no module {module!r} on Python's "
            f"path or in {os.getcwd()}"
        ) from None
    if not _is_method(kind):
        raise ValueError(f"{where} must be a Policy or a CompressedCache, got {kind!r}")
    listed = next((each for each in LISTED.values() if each.kind is kind), None)
    return _described(where, kind) if listed is None else dataclasses.replace(listed, name=where)


def _is_method(found: Any) -> TypeGuard[type[Any]]:
    if not (isinstance(found, type) and issubclass(found, Policy | CompressedCache)):
        return False
    # classes to derive from are none
    return found.score is not Policy.score if issubclass(found, Policy) else found._layer is not CompressedCache._layer


def _described(name: str, kind: type[Any]) -> Listed:
    return describe(name, (inspect.getdoc(kind) or kind.__name__).partition("\n")[0], kind)


def _import_installed() -> None:
    """Lists the methods of other packages; one that cannot be imported is skipped, with a warning."""
    for point in entry_points(group=GROUP):
        before = dict(LISTED)
        try:
            found = point.load()
            known = next((each for each in LISTED.values() if each.kind is found), None)
            if known is not None:
                # it has registered itself under another name: now it has both
                register(known.name, known.about, **_facts(known, point.name))(found)
            elif _is_method(found):
                register(point.name, _described(point.name, found).about)(found)
            elif not inspect.ismodule(found):
                raise TypeError(f"expected a Policy, a CompressedCache or a module that registers some, got {found!r}")
        # a package may even end the process when it is imported
        except (Exception, SystemExit) as error:
            LISTED.clear()
            LISTED.update(before)
            package = "an unknown package" if point.dist is None else point.dist.name
            warnings.warn(
                f"the method {point.name!r} of {package} ({GROUP}: {point.value}) is skipped: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _facts(known: Listed, name: str) -> dict[str, Any]:
    """What a class was registered with, and a name beside its own."""
    facts = {each.name: getattr(known, each.name) for each in dataclasses.fields(known)}
    del facts["name"], facts["about"], facts["kind"]
    return facts | {"aliases": tuple(dict.fromkeys([*known.aliases, *([] if name == known.name else [name])]))}


def _gear(name: str) -> Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache]:
    def gear(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        settings = {"preset": name, **settings}
        return GEARCache.preset(model, settings.pop("preset"), **settings)

    return gear


def _list_own() -> None:
    """Lists this package's methods, by the date of their papers, before those of others."""
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
            costs="packing a token, then its block; unpacking where attention reads", paper="2403.05527",
            kind=GEARCache, label="GEARCache", takes_budget=False, settings=_OF_GEAR,
            defaults={"preset": "default", "basis": None, **vars(PRESETS["default"])},
        ),
        Method(
            "kivi", "every token, 2-bit codes", _gear("kivi"),
            costs="as `gear`", paper="2402.02750", kind=KIVICache, label="KIVICache", takes_budget=False,
            settings=_OF_KIVI, defaults=vars(PRESETS["kivi"]),
        ),
    ):  # fmt: skip
        LISTED[method.name] = method
    ordered = sorted(LISTED.values(), key=lambda each: (not is_own(each.kind), each.paper, each.name))
    LISTED.clear()
    LISTED.update({each.name: each for each in ordered})


class _Methods(MutableMapping[str, Listed]):
    """LISTED, completed by what other packages installed when it is first looked at: they may import this module."""

    _is_complete = False

    def _all(self) -> dict[str, Listed]:
        if not self._is_complete:
            self._is_complete = True
            _import_installed()
        return LISTED

    def __getitem__(self, name: str) -> Listed:
        return self._all()[name]

    def __setitem__(self, name: str, method: Listed) -> None:
        self._all()[name] = method

    def __delitem__(self, name: str) -> None:
        del self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


_list_own()
METHODS: MutableMapping[str, Listed] = _Methods()
