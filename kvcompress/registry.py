"""Caches by name, for the command line, the sweep and the tests.

A method is asked for as `name` or as `name:setting=value:setting=value`, such as `h2o:sinks=4:recent=0.25`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.quantized import GEARCache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.policies.chunkkv import ChunkKV
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.knorm import Knorm
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.policy import Policy
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.policies.tova import TOVA
from kvcompress.prefix.cache import HydragenCache

FULL = "none"
FLOOR = "streaming"


@dataclass(frozen=True)
class Method:
    """A cache the command line knows.

    build: (model, budget, settings) -> cache. takes_budget: False for what keeps every token. reads_budget: it keeps
    every token too, and its budget is of those that a step reads.
    """

    name: str
    about: str
    build: Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache]
    takes_budget: bool = True
    reads_budget: bool = False


def parse(spec: str, methods: Mapping[str, Method] | None = None) -> tuple[Method, dict[str, Any]]:
    """The method and the settings that a spec names; `methods` are those known, by default METHODS.

    Raises:
        ValueError: an unknown method, or something that is no `setting=value`.
    """
    name, *pairs = spec.strip().split(":")
    # as papers and classes write them too: H2O, SnapKV
    name = _ALIASES.get(name.lower(), name.lower())
    methods = METHODS if methods is None else methods
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods)}")
    settings = {}
    for pair in pairs:
        setting, equals, value = pair.partition("=")
        if not (setting and equals and value):
            raise ValueError(f"a method's settings are written {name}:setting=value, got {spec!r}")
        settings[setting] = _value(value)
    return methods[name], settings


def canonical(spec: str, methods: Mapping[str, Method] | None = None) -> str:
    """The one way to write a spec."""
    method, settings = parse(spec, methods)
    return ":".join([method.name, *(f"{name}={settings[name]}" for name in sorted(settings))])


def build(
    spec: str,
    model: PreTrainedModel,
    budget: int | float | None = None,
    methods: Mapping[str, Method] | None = None,
) -> CompressedCache:
    """A new cache for the model.

    Args:
        spec: a method's name, with settings or without.
        budget: tokens kept per sequence and KV head, or as a float a fraction of those seen; not read by `none`.
        methods: those known, by default METHODS.

    Raises:
        ValueError: an unknown method or setting, or a budget it cannot keep.
    """
    method, settings = parse(spec, methods)
    if method.takes_budget and budget is None:
        raise ValueError(f"the method {method.name} needs a budget: tokens to keep, or a fraction of those seen")
    try:
        return method.build(model, 0 if budget is None else budget, settings)
    except TypeError as error:
        if settings and "argument" in str(error):
            raise ValueError(f"the method {method.name} does not take these settings: {error}") from None
        raise


def _evicting(policy: type[Policy]) -> Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache]:
    def evicting(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        settings = dict(settings)
        of_cache: dict[str, Any] = {name: settings.pop(name) for name in ("allocation", "rolled") if name in settings}
        of_codes = {name: settings.pop(name) for name in ("bits", "group_size", "outliers") if name in settings}
        if of_codes:
            of_cache["packed"] = GEAR(**of_codes)
        return EvictingCache(model, policy=policy(**settings), budget=budget, **of_cache)

    return evicting


def _dense(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return DenseCache(model, **settings)


def _hydragen(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return HydragenCache(model, **settings)


def _gear(name: str) -> Callable[[PreTrainedModel, int | float, dict[str, Any]], CompressedCache]:
    def gear(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
        settings = {"preset": name, **settings}
        return GEARCache.preset(model, settings.pop("preset"), **settings)

    return gear


def _shadowkv(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return ShadowKVCache(model, budget=budget, **settings)


def _value(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


_ALIASES = {"dense": "none", "full": "none", "streaming_llm": "streaming", "expected_attention": "expected"}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", "every token: the full cache", _dense, takes_budget=False),
        Method("h2o", "heavy hitters and recent tokens", _evicting(H2O)),
        Method("snapkv", "what the last queries attend to", _evicting(SnapKV)),
        Method("chunkkv", "whole chunks of what the last queries attend to", _evicting(ChunkKV)),
        Method("kvzip", "what is looked up to say the context again, read twice", _evicting(KVzip)),
        Method("tova", "what the newest query attends to", _evicting(TOVA)),
        Method("streaming", "the first tokens and the newest", _evicting(StreamingLLM)),
        Method("keydiff", "the keys least like the others", _evicting(KeyDiff)),
        Method("knorm", "the keys of small norm", _evicting(Knorm)),
        Method(
            "expected",
            "what future queries are expected to attend to",
            _evicting(ExpectedAttention),
        ),
        Method("gear", "every token in few bits: quantised, outliers apart", _gear("default"), takes_budget=False),
        Method("kivi", "every token in 2 bits: quantised", _gear("kivi"), takes_budget=False),
        Method("hydragen", "every token, those that sequences share once", _hydragen, takes_budget=False),
        Method(
            "shadowkv",
            "everything: low-rank keys, values on the host, the chunks asked for fetched",
            _shadowkv,
            reads_budget=True,
        ),
    )
}
