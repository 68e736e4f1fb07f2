"""A layer that evicts when it has read a text, and keeps all that is decoded after it, until the next text comes.

What a question needs of a text is chosen once, by a second reading of the text; a token that is decoded has not been
read again, and says nothing about what the others are worth. So decoded tokens stay, in a tail of their own, and join
the slots, where they compete, when several tokens are fed again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.compiled_steps import CompiledTailStep, TailedLayer, pin
from kvcompress.caches.evicting_step import ChunkStep, EvictingStep
from kvcompress.caches.matching import Asked, match
from kvcompress.caches.reconstruction import RereadLayer
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import joint_output
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep
from kvcompress.storage.ragged import Fitted, RaggedSlots
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.tail import TailSegment, moved

# a tail takes room for so many tokens at a time, or for a share of those it holds
_ROOM, _SHARE = 32, 4


class AnswerStep(EvictingStep):
    """One token, which stays."""

    def __init__(self, layer: "AnsweringLayer", x: AttentionInput) -> None:
        super().__init__(layer, x)
        counts = layer.padding.counts(x.visible)
        self.real = [1] * x.key.shape[0] if counts is None else counts
        lengths = layer.row_lengths()
        self.tail = layer.tail_for(x.key, x.value)
        # a copy: the lengths grow in place
        self.query_positions = layer.reaches(layer.lengths[:, None].clone())
        self.tail.put(x.key, x.value, self.real, lengths)
        layer.count_rows(self.real)

    def attend(self, x: AttentionInput) -> Tensor:
        answers = [part.attend(x.query, self.query_positions, x.spec) for part in (self.slots, self.tail)]
        return joint_output(answers, x.sinks)

    def commit(self) -> None:
        self.layer.lengths.add_(self.input.real_tokens)


class AnsweringLayer(TailedLayer, RereadLayer):
    """A layer whose decoded tokens stay in a tail; its slots are chosen from what is fed several tokens at a time."""

    is_compileable = TailedLayer.is_compileable
    keeps_answers = True
    reserves_on_gpu = True
    # real tokens of each row so far, as the host knows them; None where it has to ask
    _rows: list[int] | None = None
    # queries of the second reading that has just ended, and how they make logits
    _asked: tuple[list[Asked], LogitSpec] = [], LogitSpec(1.0)

    @property
    def is_ragged(self) -> bool:
        return True

    def segments(self) -> list[Segment]:
        return super().segments() + ([] if self.tail is None else [self.tail])

    def tokens_kept(self) -> Tensor:
        return CompressedLayer.tokens_kept(self)

    def held_positions(self) -> Tensor:
        of_slots, tail = super().held_positions(), self.tail
        if tail is None:
            return of_slots
        return torch.cat([of_slots, tail.positions[:, None].expand(-1, of_slots.shape[1], -1)], -1)

    def counters(self) -> dict[str, Tensor]:
        column = {} if self._steps is None else {"column": self._steps.column}
        return RereadLayer.counters(self) | column

    def reset(self) -> None:
        super().reset()
        self.tail = self._rows = None
        self._is_ready = False

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        self._look()
        self._rows = None
        super().map_tensors(change)

    def row_lengths(self) -> list[int]:
        """Real tokens of each row so far."""
        self._look()
        if self._rows is None:
            self._rows = self.lengths.tolist()
        return self._rows

    def count_rows(self, real: list[int]) -> None:
        """Counts tokens that each row was fed."""
        self._rows = [length + fresh for length, fresh in zip(self.row_lengths(), real, strict=True)]

    def tail_for(self, key: Tensor, value: Tensor) -> TailSegment:
        """The tail, with room for one token more."""
        tail = self.tail
        self._is_ready = False
        if tail is None:
            self.tail = tail = TailSegment(key, value, _ROOM)
        elif tail.room <= max(tail.held):
            self._grow(tail, 1)
        return tail

    def _grow(self, tail: TailSegment, tokens: int) -> None:
        held = max(tail.held)
        tail.grow(held + max(tokens, _ROOM, held // _SHARE))
        self._steps = None

    def _begin(self, x: AttentionInput) -> ForwardStep:
        if torch.compiler.is_compiling():
            assert self.slots is not None
            return CompiledTailStep(self._ready_steps(), [self.slots], x)
        if x.tokens == 1 and self.slots is not None and self.waiting is None:
            self._note_pins(x)
            return AnswerStep(self, x)
        self.take_answers()
        return super()._begin(x)

    def take_answers(self) -> None:
        """Moves the tail's tokens to the slots."""
        slots, tail = self.slots, self.tail
        self._rows = None
        self._is_ready = False
        if tail is None:
            return
        assert isinstance(slots, RaggedSlots)
        used = max(tail.held)
        if used:
            places = tail.positions[:, None, :used].expand(-1, tail.keys.shape[1], -1)
            kept = torch.cat([slots.positions, places], -1) != EMPTY
            scores = torch.cat([slots.scores, torch.zeros_like(places, dtype=torch.float32)], -1)
            self.refill(slots, tail.keys[:, :, :used], tail.values[:, :, :used], places, scores, kept)
        self.tail = None

    @property
    def _fits(self) -> bool:  # type: ignore[override]
        """Whether what is kept is fitted to answer for all; not where a window hides some of it from later queries."""
        how = self.policy.rereads
        return how is not None and how.fits > 0 and self.window is None

    def received(self) -> tuple[ChunkStep, Tensor]:
        assert self.waiting is not None
        self._asked = self.waiting.asked, self.waiting.spec
        return super().received()

    def take_asked(self) -> tuple[list[Asked], LogitSpec]:
        """The queries of a second reading that has ended, once, and how they make logits."""
        asked, self._asked = self._asked, ([], LogitSpec(1.0))
        return asked

    def refill(
        self, slots: RaggedSlots, key: Tensor, value: Tensor, places: Tensor, scores: Tensor, kept: Tensor
    ) -> None:
        asked, spec = self.take_asked()
        fitted = self._match(asked, spec, slots, key, value, places, kept) if asked else None
        slots.refill(key, value, places, scores, kept, self._capacities(kept.sum(-1)), fitted)

    def take_in(
        self,
        seen: int,
        lengths: Tensor,
        key: Tensor,
        value: Tensor,
        places: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Puts tokens that another layer holds into slots of this one, which is empty.

        Args:
            seen: columns fed until now. lengths: real tokens of each sequence, [batch].
            key, value: [batch, kv_heads, tokens, head_dim]. places: their positions, [batch, kv_heads, tokens] int32,
                EMPTY for none. bias: their log-weights, of the shape of places; None where there are none.
        """
        nothing = key[:, :, :0]
        self.lazy_initialization(key, value)
        slots = self._allocate(AttentionInput(nothing, nothing, value[:, :, :0], None, LogitSpec(1.0), None))
        assert isinstance(slots, RaggedSlots)
        self.lengths.copy_(lengths)
        self.clock.advance(seen)
        kept = torch.cat([slots.positions, places], -1) != EMPTY
        fitted = None
        if bias is not None:
            held = slots.bias
            assert held is not None
            values = torch.cat([slots.contents()[1], value], 2)
            fitted = Fitted(values, torch.cat([held, bias], -1), torch.zeros_like(kept))
        scores = torch.zeros_like(kept, dtype=torch.float32)
        slots.refill(key, value, places, scores, kept, self._capacities(kept.sum(-1)), fitted)
        self._follow_budget(self.lengths)
        self._mark_static()

    def _match(
        self,
        asked: list[Asked],
        spec: LogitSpec,
        slots: RaggedSlots,
        key: Tensor,
        value: Tensor,
        places: Tensor,
        kept: Tensor,
    ) -> Fitted:
        """Values and log-weights of slots and of a chunk, fitted to the queries of the second reading."""
        how = self.policy.rereads
        assert how is not None
        held = slots.bias
        assert held is not None
        keys, values = slots.contents()
        first = places.masked_fill(places == EMPTY, torch.iinfo(places.dtype).max).amin(-1, keepdim=True)
        of_chunk = torch.where(places == EMPTY, -1, 1 + (places - first) // how.chunk)
        blocks = torch.cat([torch.where(slots.positions == EMPTY, -1, 0), of_chunk], -1).long()
        bias = torch.cat([held, torch.zeros_like(places, dtype=held.dtype)], -1)
        keys, values = torch.cat([keys, slots.as_held(key, places)], 2), torch.cat([values, value], 2)
        fresh, bias = match(asked, keys, values, bias, blocks, kept, spec)
        return Fitted(fresh, bias, (fresh != values).any(-1))

    def _capacities(self, kept: Tensor) -> Tensor:
        # none is free, as what is decoded goes elsewhere
        return kept.cpu().clamp(min=1)

    def _make_ready(self, steps: int) -> None:
        slots = self.slots
        if slots is None or self.waiting is not None:
            return
        tail = self.tail
        if tail is None:
            self.tail = tail = TailSegment(*slots.like(), max(steps, _ROOM))
        elif tail.room < max(tail.held) + steps:
            self._grow(tail, max(steps, self._reserved))
        self._left = tail.room - max(tail.held)
        self._catch_up()
        pin(*slots.tensors().values())

    def _catch_up(self) -> None:
        tail = self._tail
        assert tail is not None
        positions, _, column = tail.places(self.row_lengths())
        if self._steps is not None and (
            self._steps.positions is not positions or self._steps.lengths is not self.lengths
        ):
            self._steps = None
        self._count_on(tail, (positions, self.lengths, column))

    def _take_in(self, written: int) -> None:
        assert self._tail is not None
        self._tail.take_in(written)
        # the steps have counted on the lengths themselves
        self._rows = None
        self._catch_up()

    def _remap(self, remap: Tensor) -> None:
        tail = self.tail
        self._is_ready = False
        super()._remap(remap)
        self._rows = None
        if tail is None:
            return
        tail.remap(remap, self.row_lengths())

    def _warn_of_filler(self, remap: Tensor) -> None:
        # nothing was evicted for what was decoded
        if self._tail is not None:
            held = self._tail.positions
            hidden = ((held != EMPTY) & (moved(held, remap) == EMPTY)).to(remap.dtype)
            gone = torch.zeros_like(remap).scatter_add_(1, held.clamp(min=0).long(), hidden)
            remap = remap.masked_fill(gone > 0, 0)
        super()._warn_of_filler(remap)

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tail = self.tail
        tensors, facts = super().dump()
        if tail is not None:
            dumped, held = tail.dump()
            tensors, facts = tensors | {f"tail.{name}": x for name, x in dumped.items()}, facts | held
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        of_tail = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("tail.")}
        super().restore({name: x for name, x in tensors.items() if not name.startswith("tail.")}, facts)
        if of_tail:
            self.tail = TailSegment.load(of_tail, facts)
