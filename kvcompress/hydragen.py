"""Exact attention over prefixes and trees that sequences share, each token stored, run and read once.

Hydragen, arXiv:2402.05099, for any model and any tree: a node holds the keys and values of tokens that several
sequences have in common. Its tokens go through the model once, its storage is one tensor for all of its sequences, and
the queries of all of them meet it as one matrix (kernels/prefix.py). What differs is each sequence's suffix. The
answers of nodes and suffix merge by their log-sum-exps, which is exact.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache import CompressedCache
from kvcompress.layer import CompressedLayer
from kvcompress.padding import PaddingRecord
from kvcompress.shared import Move, SharedLayer, SharedRecord
from kvcompress.tree import ROOT, Shared, Tree, by_length, common_tokens, find_shared

# fewer shared tokens than these cost more in another launch than they save
MIN_TOKENS = 32


class HydragenCache(CompressedCache):
    """Keeps every token, shared ones once: `HydragenCache(model, input_ids, attention_mask)`. Exact."""

    layers: list[SharedLayer]  # type: ignore[assignment]
    padding: SharedRecord

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        self.tree = Tree()
        self.min_tokens = min_tokens
        super().__init__(model)

    @classmethod
    def from_prefix(cls, model: PreTrainedModel, prefix_ids: Tensor | Sequence[int], **settings: Any) -> Self:
        """A cache that holds one prefix, for any number of sequences that begin with it.

        Args:
            prefix_ids: [tokens] or [1, tokens].
        """
        ids = torch.as_tensor(prefix_ids, device=model.device).reshape(-1)
        cache = cls(model, **settings)
        cache.tree.set_leaves(cache._prefill([ROOT], [ids]))
        cache._lay_out()
        return cache

    def _record(self) -> PaddingRecord:
        return SharedRecord(self.tree)

    def _layer(self, index: int, window: int | None, layers: int) -> CompressedLayer:
        return SharedLayer(self.padding, window, index == 0, self.tree)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == 0:
            self._meet(key_states.shape[0])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _meet(self, batch: int) -> None:
        """Before a forward of `batch` rows: as long as nothing is a row's own, each may stand for several."""
        rows = len(self.tree.leaves)
        if not rows:
            self.tree.set_leaves([ROOT] * batch)
        elif batch > rows and batch % rows == 0 and not self.padding.laid_out:
            self.tree.repeat(batch // rows)
            self.padding.repeat(batch // rows)
            self._set_rows(batch)

    def _set_rows(self, batch: int) -> None:
        for layer in self.layers:
            if layer.kv_shape is not None:
                layer.kv_shape = (batch, *layer.kv_shape[1:])

    def _prefill(self, parents: list[int], pieces: list[Tensor]) -> list[int]:
        """Runs pieces of tokens, each once, as the continuation of a node each; the names of the new nodes."""
        names = [ROOT] * len(pieces)
        for group in by_length(len(piece) for piece in pieces):
            self.tree.set_leaves([parents[index] for index in group])
            self._lay_out()
            self._feed([pieces[index] for index in group])
            self._freeze()
            for index, name in zip(group, self.tree.leaves, strict=True):
                names[index] = name
        return names

    def _lay_out(self) -> None:
        """Columns for what the rows hold, each padded on the left to the longest."""
        lengths = self.tree.lengths()
        seen = max(lengths)
        self.padding.laid_out = False
        self.padding.visible = None
        if min(lengths) < seen:
            place = torch.arange(seen, device=self._device())
            self.padding.visible = place >= seen - torch.tensor(lengths, device=place.device)[:, None]
        for layer in self.layers:
            layer.dense = None
            layer._seen = seen
        self._set_rows(len(lengths))

    @torch.no_grad()
    def _feed(self, pieces: list[Tensor]) -> None:
        """One forward, without logits, of a piece of tokens for each row."""
        model: Any = self._model()
        width = max(len(piece) for piece in pieces)
        ids = torch.stack([torch.nn.functional.pad(piece, (width - len(piece), 0)) for piece in pieces])
        place = torch.arange(width, device=ids.device)
        fresh = place >= width - torch.tensor([len(piece) for piece in pieces], device=ids.device)[:, None]
        held = torch.tensor(self.tree.lengths(), device=ids.device)[:, None]
        model.base_model(
            input_ids=ids,
            attention_mask=self.cover(fresh),
            position_ids=held + (fresh.long().cumsum(-1) - 1).clamp(min=0),
            past_key_values=self,
            use_cache=True,
        )

    def cover(self, mask: Tensor) -> Tensor:
        """The attention mask of all tokens, for new ones alone.

        Args:
            mask: of the new tokens, [batch, new].

        Returns:
            [batch, tokens seen + new].
        """
        seen = int(self.get_seq_length())
        past = self.padding.visible
        past = mask.new_ones(len(mask), seen) if past is None else past.to(mask)
        return torch.cat([past.repeat_interleave(len(mask) // len(past), 0), mask], 1)

    def _freeze(self) -> None:
        """Turns each row's suffix into a node."""
        counts = self._suffix_lengths()
        leaves = list(self.tree.leaves)
        nodes = []
        for row, count in enumerate(counts):
            if count:
                leaves[row] = self.tree.add(leaves[row], count)
                nodes.append((leaves[row], row, 0, count))
        self._move(Move(nodes, counts, counts), leaves)

    def _move(self, move: Move, leaves: list[int]) -> None:
        for layer in self.layers:
            layer.move(move)
        self.tree.set_leaves(leaves)
        self.padding.laid_out = all(layer.dense is not None for layer in self.layers)

    def _suffix_lengths(self) -> list[int]:
        """Tokens of each row that are its own."""
        seen = int(self.get_seq_length())
        visible, ahead = self.padding.visible, self.tree.ahead
        held = torch.tensor(self.tree.lengths())
        shown = torch.full_like(held, seen) if visible is None else visible.sum(-1).cpu()
        return (shown - held + (0 if ahead is None else ahead.cpu())).tolist()

    def _device(self) -> torch.device:
        model = self._model()
        assert model is not None
        return model.device
