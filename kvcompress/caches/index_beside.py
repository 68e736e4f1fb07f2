"""Layers that hold index keys apart from keys and values: of every token, in order, whatever becomes of the latter."""

from typing import Any

from torch import Tensor

from kvcompress.caches.quantized_step import QuantizedStep
from kvcompress.layer import AttentionInput, CompressedLayer
from kvcompress.storage.indexed import DenseIndex
from kvcompress.storage.segment import Segment


class IndexBeside(CompressedLayer):
    """A layer with the index keys of its tokens.

    index: of every token; None before the first, and where the layer has no indexer.
    """

    index: DenseIndex | None = None

    def segments(self) -> list[Segment]:
        return [*super().segments(), *([] if self.index is None else [self.index])]

    def hold_index(self, keys: Tensor, visible: Tensor | None) -> None:
        """Holds index keys of further tokens, [batch, 1, tokens, width]; visible: [batch, tokens] bool or None."""
        if self.index is None:
            self.index = DenseIndex(keys)
        self.index.append(keys, keys[..., :0], visible)

    def _scored(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor]:
        past, places, lengths = super()._scored(x)
        if self.index is None:
            return past, places, lengths
        batch = x.key.shape[0]
        return self.index.index_keys(), self.index.positions().expand(batch, -1)[:, None], lengths

    def reset(self) -> None:
        super().reset()
        self.index = None

    def _remap(self, remap: Tensor) -> None:
        super()._remap(remap)
        if self.index is not None:
            assert self.padding.before is not None
            self.index.hide(remap, self.padding.before)

    def _crop(self, tokens: int) -> None:
        super()._crop(tokens)
        if self.index is not None:
            self.index.drop_last(tokens)

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().dump()
        if self.index is None:
            return tensors, facts
        of_index, told = self.index.dump()
        return tensors | {f"index.{name}": tensor for name, tensor in of_index.items()}, facts | {"index": told}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore({name: each for name, each in tensors.items() if not name.startswith("index.")}, facts)
        if "index" in facts:
            self.index = DenseIndex.load(under("index.", tensors), facts["index"])


class StepBeside(QuantizedStep):
    """A forward through packed tokens, with index keys beside them."""

    layer: IndexBeside  # type: ignore[assignment]

    def commit(self) -> None:
        super().commit()
        if self.input.index is not None:
            self.layer.hold_index(self.input.index, self.input.visible)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
