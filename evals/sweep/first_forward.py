"""One forward over a batch of contexts, for many evicting caches.

Most evict at the end of a forward, so that their first one gives every layer the same queries, keys and values,
whatever the policy. Recorded once, these fill each cache as the forward itself would, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import DenseCache, EvictingCache
from kvcompress.evals.sweep.protocol import Reader
from kvcompress.hf import sizes
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.method import is_own


@dataclass
class _Call:
    """What a layer of a cache was given. spec: of its logits. kwargs: what else `attend` takes."""

    key: Tensor
    value: Tensor
    query: Tensor
    visible: Tensor | None
    spec: LogitSpec
    kwargs: dict[str, Any]


class FirstForward:
    """The recording; `fill` gives an empty evicting cache what the forward would have given it."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
        """Reads these rows of tokens, padded on the left as `Reader` does."""
        cache = DenseCache(model)
        self._calls: list[_Call] = []
        for layer in cache.layers:
            layer.attend = self._recording(layer)  # type: ignore[method-assign]
        reader = Reader(model, cache)
        reader.read(rows)
        self.mask = reader.mask

    def _recording(self, layer: Any) -> Any:
        attend = type(layer).attend

        def recording(query: Tensor, visible: Tensor | None, spec: LogitSpec, **kwargs: Any) -> Tensor:
            keys, values = layer.pending_kv
            self._calls.append(_Call(keys, values, query, visible, spec, kwargs))
            return attend(layer, query, visible, spec, **kwargs)

        return recording

    @staticmethod
    def serves(cache: Any) -> bool:
        """True for caches whose first forward does not depend on them, and which need nothing else.

        A class of somebody's own may attend to less, or want to be told of each forward.
        """
        return isinstance(cache, EvictingCache) and is_own(type(cache)) and cache.policy.rereads is None

    @staticmethod
    def size(model: PreTrainedModel, tokens: int) -> int:
        """The approximate bytes of a recording of so many tokens, pads included."""
        of = sizes(model.config)
        return 2 * tokens * of.hidden * of.layers * model.dtype.itemsize

    def fill(self, reader: Reader) -> None:
        """Does the first forward of a reader of these rows, without the model.

        Raises:
            ValueError: the reader's cache is not empty, reads tokens twice, or is not an evicting one.
        """
        cache = reader.cache
        if not self.serves(cache) or cache.get_seq_length():
            raise ValueError(
                f"a recorded forward fills an empty EvictingCache; got {type(cache).__name__} "
                f"that has seen {cache.get_seq_length()} tokens"
            )
        for index, call in enumerate(self._calls):
            cache.update(call.key, call.value, index)
            cache.layers[index].attend(call.query, call.visible, call.spec, **call.kwargs)
        reader.mask = self.mask
