"""Tokens of multi-head latent attention: what is held as keys has the values in it."""

from typing import ClassVar

from torch import Tensor

from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.indexed import IndexedKeys, IndexedSlots, RaggedIndexedSlots
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.slots import SlotSegment


class _Latents(IndexedKeys):
    """Segments whose values are the first numbers of their keys, and are not stored.

    Keys are a token's latent, then what is shared of its keys, and last that by which an indexer scores it, if there is
    one, [..., rank + shared width + index width]. rank: width of latents.
    """

    rank: int

    @property
    def values(self) -> Tensor:
        """The latents, a view of the keys."""
        return self.keys[..., : self.rank]

    @values.setter
    def values(self, values: Tensor) -> None:
        """Keeps only their width: whoever sets values sets keys with them."""
        self.rank = values.shape[-1]


def _stored(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name != "values")


class DenseLatents(_Latents, DenseSegment):
    """Every token, in order."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(DenseSegment.tensor_names)

    def held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values, visible = super().held()
        return self._seen(keys), values, visible

    def index_keys(self) -> Tensor:
        """The index keys of the tokens held, [batch, 1, length, index width]."""
        return self._index(self.keys[:, :, : self.length])

    def reorder(self, order: Tensor) -> None:
        self._reorder((self.keys,), order)


class LatentSlots(_Latents, IndexedSlots):
    """A fixed number of slots."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(SlotSegment.tensor_names)


class RaggedLatentSlots(_Latents, RaggedIndexedSlots):
    """As many slots as each head needs."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(RaggedSlots.tensor_names)
