"""Tokens of multi-head latent attention: what is held as keys has the values in it."""

from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.kernels.ragged import padded
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.segment import Segment
from kvcompress.storage.slots import SlotSegment


class _Latents(Segment):
    """Segments whose values are the first numbers of their keys, and are not stored.

    Keys are a token's latent, then what is shared of its keys, and last that by which an indexer scores it, if there is
    one, [..., rank + shared width + index width]. rank: width of latents. index_dim: width of index keys, 0 for none.
    """

    keys: Tensor
    rank: int
    index_dim: int = 0

    def _seen(self, keys: Tensor) -> Tensor:
        """What attention sees of keys."""
        return keys[..., : -self.index_dim] if self.index_dim else keys

    def _index(self, keys: Tensor) -> Tensor:
        """What an indexer sees of keys."""
        return keys[..., keys.shape[-1] - self.index_dim :]

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
        """The index keys of the tokens held, [batch, length, index width]."""
        return self._index(self.keys[:, 0, : self.length])

    def reorder(self, order: Tensor) -> None:
        self._reorder((self.keys,), order)


class DenseIndex(DenseSegment):
    """What an indexer scores, of tokens whose latents are held elsewhere: keys [batch, 1, room, width] alone."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(DenseSegment.tensor_names)

    def __init__(self, key: Tensor) -> None:
        super().__init__(key, key[..., :0])

    @property
    def values(self) -> Tensor:
        """None: of no width."""
        return self.keys[..., :0]

    @values.setter
    def values(self, values: Tensor) -> None:
        pass

    def component(self, name: str) -> str:
        return "index"

    def kept(self) -> Tensor:
        # these tokens are counted where their latents are
        return torch.zeros(self.keys.shape[0], 1, dtype=torch.int64, device=self.keys.device)

    def index_keys(self) -> Tensor:
        """[batch, length, width]."""
        return self.keys[:, 0, : self.length]


class LatentSlots(_Latents, SlotSegment):
    """A fixed number of slots."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(SlotSegment.tensor_names)

    def rotated_keys(self) -> Tensor:
        return self._seen(self.keys)

    def index_keys(self) -> Tensor:
        """The index keys of the tokens in the slots, [batch, slots, index width]."""
        return self._index(self.keys[:, 0])


class RaggedLatentSlots(_Latents, RaggedSlots):
    """As many slots as each head needs."""

    tensor_names: ClassVar[tuple[str, ...]] = _stored(RaggedSlots.tensor_names)

    def _rotated_rows(self) -> Tensor:
        return self._seen(self.keys)

    def index_keys(self) -> Tensor:
        """The index keys of the tokens in the slots, [batch, most slots, index width]: a copy."""
        rows = self._index(self.keys)
        keys, _, _ = padded(rows, rows, self._extents(), self.positions)
        return keys[:, 0]
