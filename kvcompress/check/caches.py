"""The caches that only a check knows, in addition to the registry's, and those that it runs by default."""

from typing import Any

from transformers import PreTrainedModel

from kvcompress import registry
from kvcompress.cache import CompressedCache
from kvcompress.check.subject import DOCUMENT, rows_of, smallest_share
from kvcompress.prefix.store import PrefixStore
from kvcompress.registry import Listed, Method
from kvcompress.swiftkv.cache import AcrossKVCache, SwiftKVCache


def known_caches() -> dict[str, Listed]:
    """The registry's methods, and those that only a check builds."""
    more = (
        Method(
            "across", "layers that share storage, on a model that was not trained for it", _across, takes_budget=False
        ),
        Method("swiftkv", "the cache of a converted model", _swiftkv, takes_budget=False),
        Method("prefix", "a document kept by a PrefixStore", _prefix, takes_budget=False),
    )
    return {**registry.METHODS, **{method.name: method for method in more}}


def default_caches() -> list[str]:
    """Every cache, and those settings that run other code."""
    return [*registry.METHODS, "h2o:rerotated=true", "h2o:bits=4", "across", "swiftkv", "prefix"]


def _across(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return AcrossKVCache(model, **{"share": smallest_share(model.config), **settings})


def _swiftkv(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return SwiftKVCache(model, **settings)


def _prefix(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    store = PrefixStore(model, **settings)
    document = rows_of(model)[0][:DOCUMENT]
    store.prefix(document)
    return store.prefix(document)
