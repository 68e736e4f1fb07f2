"""The full cache, with kvcompress's attention: the ceiling that the others are measured against."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import CompressedCache
from kvcompress.caches.compiled_steps import CompiledSteps, SteppedLayer
from kvcompress.caches.index_beside import IndexBeside
from kvcompress.caches.spans import Spans, attend_ahead
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.merge import joint_output
from kvcompress.kernels.sparse_attention import sparse_attention
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep, ordinary_tensors
from kvcompress.storage.chunks import attend_in_chunks
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.distances import attend_by_distance
from kvcompress.storage.latent import DenseLatents
from kvcompress.storage.padding import pads_first, reordered, warn_of_short_windows
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.transform_coding import Places

# tokens past the window that a sliding layer keeps, so that drafted tokens can be taken back
SLACK = 256


class DenseStep(ForwardStep):
    """A forward whose tokens are already stored."""

    def __init__(self, layer: "DenseLayer", x: AttentionInput) -> None:
        super().__init__(x)
        self.layer = layer
        self.spans = Spans.of(x)

    def attend(self, x: AttentionInput) -> Tensor:
        return joint_output([self.layer._read(x), *attend_ahead(x, self.spans)], x.sinks)

    def commit(self) -> None:
        self.layer._drop()


class CompiledStep(ForwardStep):
    """A token that a compiled model feeds."""

    def __init__(self, steps: CompiledSteps, x: AttentionInput) -> None:
        super().__init__(x)
        self.steps = steps
        steps.store(x)

    def attend(self, x: AttentionInput) -> Tensor:
        return self.steps.output(x)

    def commit(self) -> None:
        self.steps.count(self.input)


class DenseLayer(SteppedLayer):
    """Keeps every token; on a sliding layer, those of the window and a little more."""

    is_croppable = True
    takes_spans = True
    queries_watched = 0
    storage: type[DenseSegment] = DenseSegment
    # instead, for latents, which are keys and values in one
    latent_storage: type[DenseLatents] = DenseLatents
    dropped = 0
    # of chunked attention, positions of what is held, during a forward
    _places: Tensor | None = None
    _dense: DenseSegment | None = None

    @property
    def dense(self) -> DenseSegment | None:
        """All tokens held; None before the first."""
        self._look()
        return self._dense

    @dense.setter
    def dense(self, segment: DenseSegment | None) -> None:
        self._dense, self._steps = segment, None

    def _make_ready(self, steps: int) -> None:
        dense = self.dense
        if dense is None:
            return
        if not self.record_past:
            self._let_go()
        room = dense.keys.shape[2] - dense.length
        if room < steps:
            # a step is compiled anew for each room
            dense.take_room(max(self._reserved, dense.length // 4))
        self._count_on(dense, dense.places())
        self._left = dense.keys.shape[2] - dense.length

    def _take_in(self, written: int) -> None:
        dense, steps = self._dense, self._steps
        assert dense is not None
        assert steps is not None
        length = dense.length + written
        shown = steps.positions[:, :length] != EMPTY
        fresh, dense.length = shown[:, dense.length :], length
        if dense.visible is not None or not bool(fresh.all()):
            dense.show(shown)

    def segments(self) -> list[Segment]:
        return [] if self.dense is None else [self.dense]

    def _begin(self, x: AttentionInput) -> ForwardStep:
        if torch.compiler.is_compiling():
            return CompiledStep(self._ready_steps(), x)
        self._store(x)
        return DenseStep(self, x)

    def _attend_dense(self, chunk: AttentionInput) -> tuple[Tensor, Tensor]:
        """Stores the chunk, and returns its attention to what is stored here, with the log-sum-exp."""
        self._store(chunk)
        answer = self._read(chunk)
        self._drop()
        return answer

    @ordinary_tensors()
    def room(self, like: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """The memory for keys and values of the next tokens, [batch, kv_heads, tokens, head_dim].

        What is written there, and then passed to `update`, is stored without a copy.

        Args:
            like: [batch, tokens, any], of the dtype and on the device of keys and values.
        """
        if self.dense is None:
            empty = like.new_empty(like.shape[0], kv_heads, 0, head_dim)
            self.dense = self._empty(empty, empty)
            self.lazy_initialization(empty, empty)
        return self.dense.room(like.shape[1])

    def _empty(self, key: Tensor, value: Tensor) -> DenseSegment:
        """A segment for tokens like these, [batch, kv_heads, any, head_dim]."""
        if self.latent_rank is None:
            return self.storage(key, value)
        segment = self.latent_storage(key, value)
        segment.index_dim = self.index_dim
        return segment

    def _store(self, chunk: AttentionInput) -> None:
        if self.dense is None:
            self.dense = self._empty(chunk.stored_key, chunk.value)
        elif self.record_past:
            self._let_go()
        assert self.dense is not None
        self._is_ready = False
        self.dense.append(chunk.stored_key, chunk.value, chunk.visible)
        if self.is_chunked or self.has_biases:
            self._places = self._places_held(int(self.get_seq_length()) + chunk.tokens)

    def _scored(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor]:
        past, places, lengths = super()._scored(x)
        dense = self.dense
        if dense is None:
            return past, places, lengths
        _, _, visible = dense.held()
        lengths = torch.full_like(lengths, dense.length) if visible is None else visible.sum(-1, dtype=torch.int32)
        if isinstance(dense, DenseLatents):
            past, places = dense.index_keys(), dense.positions().expand(len(lengths), -1)[:, None]
        return past, places, lengths

    def _places_held(self, seen: int) -> Tensor:
        """Positions of the tokens held, [batch or 1, held], when so many columns were seen; of padding that of the
        token before."""
        assert self.dense is not None
        _, _, visible = self.dense.held()
        device = self.dense.keys.device
        totals = torch.tensor(self.padding.real_of_last(seen, seen) or [seen], device=device)[:, None]
        if visible is None:
            return totals + torch.arange(-self.dense.length, 0, device=device)
        places = totals - visible.sum(-1, keepdim=True) + visible.cumsum(-1) - 1
        return places.clamp(min=0)

    def _read(self, chunk: AttentionInput) -> tuple[Tensor, Tensor]:
        assert self.dense is not None
        key, value, visible = self.dense.held()
        if chunk.chosen is not None:
            return sparse_attention(chunk.query, key, value, self.dense.positions(), chunk.chosen, chunk.spec)
        if chunk.biases is not None:
            assert self._places is not None
            places = self._places if visible is None else self._places.masked_fill(~visible, EMPTY)
            columns = self.padding.columns(places)
            own = columns[:, -chunk.queries :]
            return attend_by_distance(chunk.query, key, value, columns[:, None], own, chunk.spec, chunk.biases)
        if self.is_chunked:
            assert self.window is not None
            assert self._places is not None
            return attend_in_chunks(chunk.query, key, value, chunk.spec, visible, self._places, self.window)
        order = own_order = None
        if self.window is not None and visible is not None:
            order = pads_first(visible)
            visible = visible if order is None else visible.gather(1, order)
            own_order = None if chunk.visible is None else pads_first(chunk.visible[:, -chunk.queries :])
        out, lse = causal_attention(
            reordered(chunk.query, own_order),
            reordered(key, order),
            reordered(value, order),
            chunk.spec,
            visible,
        )
        if own_order is not None:
            back = own_order.argsort(-1)
            out, lse = reordered(out, back), reordered(lse[..., None], back)[..., 0]
        return out, lse

    def _drop(self) -> None:
        self._places = None
        # drafts of any length may be taken back before the next forward
        if not self.record_past:
            self._let_go()

    def _let_go(self) -> None:
        """Drops what has left the window, except a few tokens."""
        assert self.dense is not None
        if self.window is not None and self.dense.length >= self.window - 1 + 2 * SLACK:
            excess = self.dense.length - (self.window - 1 + SLACK)
            _, _, visible = self.dense.held()
            # a window counts tokens and no padding; the last columns stay in order for crop
            order = None if visible is None else pads_first(visible[:, :-SLACK])
            if order is not None:
                self.dense.reorder(order)
            self.dense.drop_first(excess)
            self.dropped += excess

    def _remap(self, remap: Tensor) -> None:
        self._hide(remap, remap.new_zeros(len(remap)))

    def _hide(self, remap: Tensor, apart: Tensor) -> None:
        """Hides what a change of padding drops; `apart` [batch]: how many first tokens of a row are held elsewhere."""
        assert self.dense is not None
        assert self.padding.before is not None
        self._is_ready = False
        stays = self.dense.hide(remap, self.padding.before)
        if self.dropped and self.window is not None:
            warn_of_short_windows(self.window, (remap >= 0).sum(-1) - apart, stays.sum(-1))

    def check_crop(self, tokens: int) -> None:
        held = 0 if self.dense is None else self.dense.length
        room = held if not self.dropped else max(0, held - ((self.window or 1) - 1))
        if tokens > room:
            why = "older ones have left the window" if self.dropped else "no more were seen"
            raise ValueError(f"crop can take back {room} tokens here, got {tokens}: {why}")

    def _crop(self, tokens: int) -> None:
        assert self.dense is not None
        self._is_ready = False
        self.dense.drop_last(tokens)

    def reset(self) -> None:
        super().reset()
        self.dense = None
        self.dropped = 0

    def plain_tokens(self) -> dict[str, Places]:
        dense = self.dense
        if dense is None:
            return {}
        _, _, visible = dense.held()
        held = [dense.length] * len(dense.keys) if visible is None else visible.sum(-1).tolist()
        seen = self._row_lengths()
        first = [max(0, total - own) for total, own in zip(seen, held, strict=True)]
        last = self.padding.last_position
        if last is None or len(last) != len(seen):
            last = [-1] * len(seen)
        # where it is unknown, or was not followed, keys are decoded as well, from a few more bits
        shift = [max(0, at + 1 - total) for at, total in zip(last, seen, strict=True)]
        sides = ("keys", "values") if self.latent_rank is None else ("keys",)
        return {side: Places(side, dense.length, visible, first, shift) for side in sides}

    def _row_lengths(self) -> list[int]:
        """How many tokens each row has seen, padding not counted."""
        assert self.dense is not None
        seen = int(self.get_seq_length())
        return self.padding.real_of_last(seen, seen) or [seen] * len(self.dense.keys)

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = ({}, {"length": 0}) if self.dense is None else self.dense.dump()
        return tensors, super().dump()[1] | {"dropped": self.dropped} | facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore(tensors, facts)
        if tensors:
            if self.latent_rank is None:
                self.dense = self.storage.load(tensors, facts)
            else:
                how = {"rank": self.latent_rank, "index_dim": self.index_dim}
                self.dense = self.latent_storage.load(tensors, facts, **how)
            keys, values, _ = self.dense.held()
            self.lazy_initialization(keys, values)
        self.dropped = facts["dropped"]


class IndexedDenseLayer(IndexBeside, DenseLayer):
    """Every token, with keys and values of many heads, and what an indexer scores beside them."""

    def _store(self, chunk: AttentionInput) -> None:
        super()._store(dataclasses.replace(chunk, index=None))
        if chunk.index is not None:
            self.hold_index(chunk.index, chunk.visible)


class DenseCache(CompressedCache):
    """Keeps every token, as transformers' DynamicCache does: `DenseCache(model)`.

    Exact. It is the ceiling in every comparison, and a cache whose budget is above the length must equal it.
    """

    serves_chunks = True

    def _check_latents(self, name: str) -> None:
        pass

    def _check_biases(self, name: str) -> None:
        pass

    def _check_blocks(self, name: str) -> None:
        pass

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        kind = IndexedDenseLayer if self.scores_blocks else DenseLayer
        return kind(self.padding, window, is_first=index == self.attending[0])
