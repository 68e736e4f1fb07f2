"""Tokens with keys by which an indexer scores them: behind the keys that attention sees, or apart from them."""

from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.kernels.ragged import padded
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.segment import Segment
from kvcompress.storage.slots import SlotSegment


class IndexedKeys(Segment):
    """Segments whose keys end in those by which an indexer scores a token, if there is one.

    index_dim: width of index keys, 0 for none.
    """

    keys: Tensor
    index_dim: int = 0

    def _seen(self, keys: Tensor) -> Tensor:
        """What attention sees of keys."""
        return keys[..., : -self.index_dim] if self.index_dim else keys

    def _index(self, keys: Tensor) -> Tensor:
        """What an indexer sees of keys."""
        return keys[..., keys.shape[-1] - self.index_dim :]


class IndexedSlots(IndexedKeys, SlotSegment):
    """A fixed number of slots."""

    def rotated_keys(self) -> Tensor:
        return self._seen(self.keys)

    def index_keys(self) -> Tensor:
        """The index keys of the tokens in the slots, [batch, kv_heads, slots, index width]."""
        return self._index(self.keys)


class RaggedIndexedSlots(IndexedKeys, RaggedSlots):
    """As many slots as each head needs."""

    def _rotated_rows(self) -> Tensor:
        return self._seen(self.keys)

    def index_keys(self) -> Tensor:
        """The index keys of the tokens in the slots, [batch, kv_heads, most slots, index width]: a copy."""
        rows = self._index(self.keys)
        keys, _, _ = padded(rows, rows, self._extents(), self.positions)
        return keys


class DenseIndex(DenseSegment):
    """What an indexer scores, of tokens that are held elsewhere: keys [batch, 1, room, width] alone."""

    tensor_names: ClassVar[tuple[str, ...]] = tuple(name for name in DenseSegment.tensor_names if name != "values")

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
        # these tokens are counted where their keys and values are
        return torch.zeros(self.keys.shape[0], 1, dtype=torch.int64, device=self.keys.device)

    def index_keys(self) -> Tensor:
        """[batch, 1, length, width]."""
        return self.keys[:, :, : self.length]
