"""Tokens of multi-head latent attention: what is held as keys has the values in it."""

from typing import ClassVar

from torch import Tensor

from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.segment import Segment
from kvcompress.storage.slots import SlotSegment


class _Latents(Segment):
    """Segments whose values are the first numbers of their keys, and are not stored.

    Keys are a token's latent and then what is shared of its keys, [..., rank + shared width]. rank: width of latents.
    """

    keys: Tensor
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

    def reorder(self, order: Tensor) -> None:
        self._reorder((self.keys,), order)


class LatentSlots(_Latents, SlotSegment):
    """A fixed number of slots."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(SlotSegment.tensor_names)


class RaggedLatentSlots(_Latents, RaggedSlots):
    """As many slots as each head needs."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(RaggedSlots.tensor_names)
