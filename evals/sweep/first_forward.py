"""One forward over a batch of contexts, for many caches.

The first forward through most caches gives every layer the same queries, keys and values, whatever the cache then keeps
of them. Recorded once, these fill each cache as the forward itself would, bit for bit. What takes time beyond the
model's own part is done once too: a layer's attention, the sums of it that policies observe, and the second reading of
those that read twice.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvcompress import DenseCache, EvictingCache, GEARCache, HydragenCache, ShadowKVCache, hf
from kvcompress.caches.matching import Asked
from kvcompress.caches.reconstruction import RereadLayer
from kvcompress.evals.sweep.protocol import Reader
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.runtime import recalling
from kvcompress.policies.method import is_own
from kvcompress.swiftkv.model import SwiftKVModel

# caches that attend exactly in their first forward, and store afterwards
_SERVED = (DenseCache, EvictingCache, GEARCache, HydragenCache, ShadowKVCache)
# how many bytes a recording may take
MOST_BYTES = 8 * 2**30
# ops that look at all pairs of tokens
_QUADRATIC = ("causal_attention", "causal_column_sums")


class Known:
    """Results of a layer's expensive ops, by the contents of their arguments."""

    def __init__(self) -> None:
        self._found: list[tuple[str, list[Any], Any]] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The function's result, computed if these arguments are new."""
        name = function.__name__
        if name not in _QUADRATIC:
            return function(*args, **kwargs)
        given = [*args, *kwargs.items()]
        for known, arguments, found in self._found:
            if known == name and len(arguments) == len(given) and all(map(_is_same, arguments, given)):
                return _copied(found)
        found = function(*args, **kwargs)
        self._found.append((name, given, _copied(found)))
        return found


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _copied(found: Any) -> Any:
    # whoever asked may write to it
    return found.clone() if isinstance(found, Tensor) else tuple(map(_copied, found))


@dataclass
class _Call:
    """What a layer of a cache was given. spec: of its logits. kwargs: what else `attend` takes. known: its results."""

    key: Tensor
    value: Tensor
    query: Tensor
    visible: Tensor | None
    spec: LogitSpec
    kwargs: dict[str, Any]
    known: Known = field(default_factory=Known)


@dataclass(frozen=True)
class _Noted:
    """What a layer has noted of a second reading: the attention that each token received, and queries to fit to."""

    received: Tensor
    asked: list[Asked]
    spec: LogitSpec

    @classmethod
    def of(cls, layer: RereadLayer) -> "_Noted":
        waiting = layer.waiting
        assert waiting is not None
        assert waiting.segment is not None
        return cls(waiting.segment.scores.clone(), list(waiting.asked), waiting.spec)

    def tell(self, layer: RereadLayer) -> None:
        """Lets a layer that waits for a second reading know what another has noted."""
        waiting = layer.waiting
        assert waiting is not None
        assert waiting.segment is not None
        waiting.segment.scores.copy_(self.received)
        waiting.asked, waiting.spec = list(self.asked), self.spec


class FirstForward:
    """The recording; `fill` gives an empty cache what the forward would have given it."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
        """Reads these rows of tokens, padded on the left as `Reader` does."""
        cache = DenseCache(model)
        self._calls: list[_Call] = []
        self._decoder = hf.decoder_of(model)
        self._second_readings: dict[Any, list[_Noted]] = {}
        for layer in cache.layers:
            layer.attend = self._recording(layer)  # type: ignore[method-assign]
        reader = Reader(model, cache)
        reader.read(rows)
        self.mask = reader.mask
        self._ids, _ = reader.columns(rows)

    def _recording(self, layer: Any) -> Any:
        attend = type(layer).attend

        def recording(query: Tensor, visible: Tensor | None, spec: LogitSpec, **kwargs: Any) -> Tensor:
            keys, values = layer.pending_kv
            call = _Call(keys, values, query, visible, spec, kwargs)
            self._calls.append(call)
            with recalling(call.known):
                return attend(layer, query, visible, spec, **kwargs)

        return recording

    @staticmethod
    def serves(cache: Any) -> bool:
        """True for caches whose first forward does not depend on them.

        A class of somebody's own may attend to less, or want to be told of each forward. What is rotated anew attends
        with other rounding errors. A converted model gives each cache only the queries that it needs.
        """
        if not isinstance(cache, _SERVED) or not is_own(type(cache)) or getattr(cache, "rerotated", False):
            return False
        return FirstForward.records(cache._model())

    @staticmethod
    def records(model: Any) -> bool:
        """True for models whose first forward can be recorded, as they feed all caches alike."""
        # what is recorded is keys and values, once of each layer: no states, none of another layer, no latents
        config = hf.text_config(model)
        return hf.all_attend(config) and hf.latent_rank(config) is None and not isinstance(model, SwiftKVModel)

    @classmethod
    def most_rows(cls, model: PreTrainedModel, tokens: int) -> int:
        """How many rows of so many tokens a recording may have: 0 if one is too large, or the model has none."""
        return MOST_BYTES // cls.size(model, tokens) if cls.records(model) else 0

    @staticmethod
    def size(model: PreTrainedModel, tokens: int) -> int:
        """The approximate bytes of a recording of so many tokens, pads included."""
        every = hf.layer_heads(hf.text_config(model))
        # keys and values as they came, and as the cache that was read through held them
        numbers = sum((2 * own.heads + 4 * own.kv_heads) * own.head_dim for own in every)
        return tokens * numbers * model.dtype.itemsize

    def fill(self, reader: Reader) -> None:
        """Does the first forward of a reader of these rows, without the model.

        Raises:
            ValueError: the reader's cache is not empty, or of another kind.
        """
        cache = reader.cache
        if not self.serves(cache) or cache.get_seq_length():
            raise ValueError(
                f"a recorded forward fills an empty cache of {', '.join(kind.__name__ for kind in _SERVED)}; got "
                f"{type(cache).__name__} that has seen {cache.get_seq_length()} tokens"
            )
        if isinstance(cache, EvictingCache):
            cache._read_again = functools.partial(self._read_again, cache)  # type: ignore[method-assign]
        try:
            with torch.inference_mode():
                cache.forward_begins(self._decoder, self._ids)
                for index, call in enumerate(self._calls):
                    cache.update(call.key, call.value, index)
                    with recalling(call.known):
                        cache.layers[index].attend(call.query, call.visible, call.spec, **call.kwargs)
                cache.forward_ended(self._decoder, self._ids)
        finally:
            vars(cache).pop("_read_again", None)
        reader.mask = self.mask

    def store(self, cache: Cache) -> None:
        """Gives a cache that stores what its layers are told, such as transformers' own, the keys and values."""
        with torch.inference_mode():
            for index, call in enumerate(self._calls):
                cache.update(call.key, call.value, index)

    def _read_again(
        self, cache: EvictingCache, decoder: Any, waiting: Sequence[RereadLayer], input_ids: Tensor
    ) -> None:
        how = cache.policy.rereads
        assert how is not None
        # what becomes of answers does not change the reading
        key = dataclasses.replace(how, keeps_answers=False)
        if key in self._second_readings:
            for layer, noted in zip(waiting, self._second_readings[key], strict=True):
                noted.tell(layer)
            return
        type(cache)._read_again(cache, decoder, waiting, input_ids)
        self._second_readings[key] = [_Noted.of(layer) for layer in waiting]
