"""The bytes of the caches that a model uses, forward by forward.

with watch_memory(model) as readings:
    ask(model, tokenizer, report, questions, "kvzip", budget=0.3)
plt.step([one.seconds for one in readings], [one.bytes for one in readings], where="post")
"""

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.memory import storage_bytes


@dataclass(frozen=True)
class Reading:
    """A cache as a forward begins or ends.

    seconds: since the watch began. tokens: how many the cache has seen. bytes: of its live storage, wherever it is.
    """

    seconds: float
    tokens: int
    bytes: int


class _Watch:
    """Notes what a decoder is given."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self._began = time.perf_counter()
        self._last: weakref.ref[hf.Cache] | None = None

    def begins(self, arguments: Iterable[Any]) -> None:
        self.note(hf.cache_in(arguments))

    def ended(self, arguments: Iterable[Any], output: Any) -> None:
        self.note(hf.cache_in(arguments) or hf.cache_of(output))

    def note(self, cache: hf.Cache | None) -> None:
        if isinstance(cache, hf.AttendingCache) and cache.reads_again:
            # for the one that holds the tokens
            cache = self._cache()
        if cache is not None:
            seconds = time.perf_counter() - self._began
            self.readings.append(Reading(seconds, int(cache.get_seq_length()), _bytes_of(cache)))
            self._last = weakref.ref(cache)

    def close(self) -> None:
        self.note(self._cache())

    def _cache(self) -> hf.Cache | None:
        return None if self._last is None else self._last()


@contextmanager
def watch_memory(model: PreTrainedModel) -> Iterator[list[Reading]]:
    """While it is open, notes the bytes of each cache that a model uses, transformers' own too.

    There are two readings for a forward: as it begins, and when all layers have run; a cache that chooses only then
    what to keep, such as KVzip's, still holds everything. The last reading is of what the last one keeps. A forward
    without a cache leaves none, and neither does a step that was compiled. Only the cache that a forward was given is
    counted, not others that live at the same time, such as the one that it is a copy of.

    Returns:
        A list that grows by two `Reading`s with each forward.
    """
    watch = _Watch()
    with hf.watched(hf.decoder_of(model), watch.begins, watch.ended):
        yield watch.readings
        watch.close()


def _bytes_of(cache: hf.Cache) -> int:
    if isinstance(cache, CompressedCache):
        return cache.memory().total_bytes
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(storage_bytes({"held": held})[0].values())
