"""A layer of GEARCache: packed blocks, and a tail that collects the next block (arXiv:2403.05527).

The tail holds tokens as they came, or in 8 bits each by itself (storage/packed_tail.py); a row's first tokens stay
apart from it, as they came.

Drafts of assisted and prompt-lookup decoding are taken back by `crop`. A forward that may be a draft stays in the tail
until the next one, and can be taken back exactly. A crop that reaches further and ends inside a block takes the block
apart: its remaining tokens go to the tail as attention saw them, decoded, and are packed again. From then on,
forwards of up to twice as many tokens wait in the tail too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.compiled_steps import CompiledTailStep, FirstSteps, PackedSteps, TailedLayer, pin
from kvcompress.caches.index_beside import IndexBeside, StepBeside, under
from kvcompress.caches.quantized_step import QuantizedStep
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.sparse_attention import sparse_attention
from kvcompress.layer import AttentionInput, ForwardStep
from kvcompress.policies.gear import GEAR
from kvcompress.storage.distances import attend_by_distance
from kvcompress.storage.key_codec import KeyCodec
from kvcompress.storage.packed_tail import PackedTail
from kvcompress.storage.padding import PaddingRecord, warn_of_short_windows
from kvcompress.storage.quantized_blocks import QuantizedBlocks
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.tail import TailSegment, moved, numbers

# a forward of at most so many tokens may be a draft, which can be taken back, so its tokens are not packed at once; a
# layer that had to take back more expects longer drafts
DRAFT = 32
# tokens that are decoded at a time
_PIECE = 4096


class QuantizedLayer(TailedLayer):
    """One layer's packed blocks, of prompts and of decoded tokens, and the tail before them."""

    is_croppable = True
    pads_first = True
    takes_spans = True
    queries_watched = 0
    reserves_on_gpu = True

    def __init__(
        self,
        padding: PaddingRecord,
        settings: GEAR,
        window: int | None = None,
        is_first: bool = False,
        codec: KeyCodec | None = None,
    ) -> None:
        """
        Args:
            settings: how tokens are encoded.
            padding, window, is_first: as in CompressedLayer.
            codec: of a calibrated basis, which packs the keys; None: they are packed as the settings say.
        """
        super().__init__(padding, window, is_first)
        self.settings = settings
        self.codec = codec
        self.prompt: QuantizedBlocks | None = None
        self.decoded: QuantizedBlocks | None = None
        # each row's first tokens; not on a sliding layer, where they would soon be out of sight
        self.first: TailSegment | None = None
        self.sinks = settings.sinks if window is None else 0
        # real tokens of each row so far
        self.lengths: list[int] = []
        self.draft = DRAFT
        if settings.tail_bits is not None:
            self.steps = PackedSteps
        # the segments beside the tail that compiled steps attend to, and where they put a row's first tokens, if some
        # are lacking; tokens that such steps fed each row's tail, until packed
        self._parts: list[Segment] = []
        self._first_steps: FirstSteps | None = None
        self._fed: list[int] = []

    @property
    def packed_width(self) -> int:
        """How many numbers a vector has that is packed."""
        assert self.kv_shape is not None
        return self.kv_shape[2]

    def _packed(self) -> list[QuantizedBlocks]:
        parts = [self.prompt] if self.decoded is self.prompt else [self.prompt, self.decoded]
        return [part for part in parts if part is not None and part.blocks]

    def segments(self) -> list[Segment]:
        if self.tail is None:
            return []
        return [*self._packed(), *([] if self.first is None else [self.first]), self.tail]

    def constants(self) -> dict[str, list[Tensor]]:
        if self.codec is None or self.tail is None:
            return super().constants()
        return {"basis": self.codec.tensors()}

    def counters(self) -> dict[str, Tensor]:
        steps = self._first_steps
        return super().counters() | ({} if steps is None else {"slots": steps.slots})

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        self._look()
        self._pack_fed()
        if self.lengths:
            self.lengths = change(torch.tensor(self.lengths)).tolist()
        self._fed = [0] * len(self.lengths)
        super().map_tensors(change)

    def reset(self) -> None:
        super().reset()
        self.prompt = self.decoded = self.tail = self.first = self._first_steps = None
        self.lengths = []
        self.draft = DRAFT

    def _begin(self, x: AttentionInput) -> ForwardStep:
        if torch.compiler.is_compiling():
            return CompiledTailStep(self._ready_steps(), self._parts, x, self._first_steps)
        return QuantizedStep(self, x)

    def _past(
        self, chunk: AttentionInput, query_positions: Tensor, joins: list[int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Attention to each segment that holds something, with the log-sum-exp.

        Args:
            joins: where the chunk is one token that no segment holds yet, in which rows it counts.
        """
        query, spec, tail, first = chunk.query, chunk.spec, self.tail, self.first
        assert tail is not None
        if chunk.biases is not None:
            return self._past_by_distance(chunk, query_positions, joins)
        answers = [part.attend(query, query_positions, spec) for part in self._packed()]
        parts = [part for part in (first, tail) if part is not None and any(part.held)]
        if query.is_cuda:
            answers += [part.attend(query, query_positions, spec) for part in parts]
            if joins is not None:
                visible = None if all(joins) else torch.tensor(joins, device=query.device)[:, None] > 0
                answers.append(causal_attention(query, chunk.key, chunk.value, spec, visible))
        elif parts or joins is not None:
            # on a CPU a call costs more than a copy of so few tokens
            others = [] if first is None or first not in parts else [(first.keys, first.values, first.positions)]
            if joins is not None:
                others.append((chunk.key, chunk.value, numbers(self._of_token(joins), query.device)[:, None]))
            answers.append(tail.attend_beside(others, query, query_positions, spec))
        return answers or nothing_seen(chunk)

    def _of_token(self, joins: list[int]) -> list[int]:
        """Positions of a single token that no segment holds yet, by row; joins: in which rows it counts."""
        return [length if counts else EMPTY for length, counts in zip(self.lengths, joins, strict=True)]

    def _scored(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor]:
        past, places, lengths = super()._scored(x)
        return past, places, numbers(self.lengths, x.key.device) if self.lengths else lengths

    def _past_by_distance(
        self, chunk: AttentionInput, query_positions: Tensor, joins: list[int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """As `_past`, with biases."""
        assert chunk.biases is not None
        pieces = [piece for part in self._packed() for piece in part.pieces()]
        for part in (self.first, self.tail):
            if part is not None and any(part.held):
                used = max(part.held)
                pieces.append((*part.contents(used), part.positions[:, None, :used]))
        if joins is not None:
            pieces.append((chunk.key, chunk.value, numbers(self._of_token(joins), chunk.key.device)[:, None, None]))
        columns = self.padding.columns
        own = columns(query_positions)
        answers = [
            attend_by_distance(chunk.query, key, value, columns(positions), own, chunk.spec, chunk.biases)
            for key, value, positions in pieces
        ]
        return answers or nothing_seen(chunk)

    def fill(self, key: Tensor, value: Tensor) -> None:
        """Packs tokens [batch, kv_heads, tokens, head_dim] that nothing attends to now; the layer is empty before."""
        self.lazy_initialization(key, value)
        batch, _, tokens, _ = key.shape
        self._tail_for(key, value)
        self.lengths = [tokens] * batch
        # a single token is not in the tail yet either
        self._pack(key, value, [0] * batch, self.lengths, max(tokens, 2))
        self.clock.advance(tokens)

    def _tail_for(self, key: Tensor, value: Tensor) -> TailSegment:
        """The tail, with room for one token more."""
        tail = self.tail
        self._pack_fed()
        self._is_ready = False
        if tail is None:
            self.tail = tail = self._empty_tail(key, value)
            if self.sinks:
                self.first = TailSegment(key, value, self.sinks)
            self.lengths = [0] * key.shape[0]
        elif tail.room <= max(tail.held):
            # accepted drafts have filled it
            tail.grow(tail.room + DRAFT)
        return tail

    def _empty_tail(self, key: Tensor, value: Tensor) -> TailSegment:
        settings = self.settings
        coding = settings.tail_coding(max(key.shape[-1], value.shape[-1]))
        if coding is None:
            return TailSegment(key, value, settings.buffer)
        return PackedTail(key, value, settings.buffer, coding, settings.hadamard)

    def lacking(self) -> list[int]:
        """How many of the first tokens that are to stay apart have not come yet, for each row."""
        return [0] * len(self.lengths) if self.first is None else [self.sinks - held for held in self.first.held]

    def _take_in(self, written: int) -> None:
        assert self._tail is not None
        counts = self._tail.take_in(written)
        early = [0] * len(counts) if self._first_steps is None else self._first_steps.take_in()
        self.lengths = [sum(each) for each in zip(self.lengths, counts, early, strict=True)]
        self._fed = [count + fed for count, fed in zip(counts, self._fed, strict=True)]
        self._catch_up()

    def _catch_up(self) -> None:
        tail = self._tail
        assert tail is not None
        if self._steps is not None and self._steps.positions is not tail.positions:
            self._steps = None
        self._count_on(tail, tail.places(self.lengths))

    def _make_ready(self, steps: int) -> None:
        tail, block = self.tail, self.settings.buffer
        if tail is None:
            return
        self._pack_fed()
        due = min(block + lacks - held for lacks, held in zip(self.lacking(), tail.held, strict=True))
        # a flush may come when so many steps have come, or, after a prompt that may be a draft, after the next one
        self._left = max(1, due)
        longest = max(tail.held)
        if tail.room < longest + max(steps, self._left):
            tail.grow(max(longest + steps, block + self.sinks + DRAFT))
        self._take_room(longest + max(steps, self._left), tail)
        self._parts = [*self._packed(), *([] if self.first is None else [self.first])]
        self._first_steps = None if self.first is None or not any(self.lacking()) else FirstSteps(self.first)
        self._fed = [0] * len(self.lengths)
        self._catch_up()
        pin(*(tensor for part in self._parts for tensor in part.tensors().values()))

    def _take_room(self, tokens: int, tail: TailSegment) -> None:
        """Makes room for so many tokens in blocks, for as many steps as are reserved at a time."""
        block, settings = self.settings.buffer, self.settings
        like = tail.like()
        target = self._target(like, settings.rank == settings.rank_decode)
        held = max(target.blocks, default=0)
        if target.room() < held + tokens // block:
            # a step is compiled anew for each room
            more = max(tokens, self._reserved + block) // block + 1
            target.take_room(max(more, held // 4 if self.window is None else 0), *like)

    def _pack_fed(self) -> None:
        """Packs what eager steps would have packed of what compiled steps have written: whole blocks one by one, or as
        many as there were when the first step came."""
        tail, fed = self._tail, self._fed
        if tail is None:
            return
        self._fill_first(tail)
        if not (self._is_ready and any(fed)):
            return
        most = [
            max(1, (held - came + 1 - lacks) // self.settings.buffer)
            for held, came, lacks in zip(tail.held, fed, self.lacking(), strict=True)
        ]
        while self._pack_tail([min(1, came) for came in fed], most):
            most = [1] * len(fed)

    def _fill_first(self, tail: TailSegment) -> None:
        """Moves what belongs to a row's first tokens out of the tail, where an older version of this cache put it."""
        apart = [min(lacks, held) for lacks, held in zip(self.lacking(), tail.held, strict=True)]
        if any(apart):
            key, value = tail.contents()
            self._set_apart(key, value, [0] * len(apart), apart, tail.held)
            rest = [held - count for held, count in zip(tail.held, apart, strict=True)]
            tail.refill(key, value, apart, rest, self.lengths, own=apart)

    def _pack_tail(self, real: list[int], most: list[int] | None = None) -> bool:
        """As `_pack`, after a forward of one token, which is in the tail, or several such."""
        tail = self.tail
        assert tail is not None
        if all(held < self.settings.buffer for held in tail.held):
            return False
        return self._pack(*tail.contents(max(tail.held)), [0] * len(real), real, 1, most)

    def _real(self, chunk: AttentionInput) -> list[int]:
        counts = self.padding.counts(chunk.visible)
        return [chunk.tokens] * chunk.key.shape[0] if counts is None else counts

    def _query_positions(self, chunk: AttentionInput) -> Tensor:
        device = chunk.key.device
        if self.window is None and not self.has_biases:
            # not used
            return torch.empty(len(self.lengths), chunk.tokens, dtype=torch.int32, device=device)
        if chunk.visible is None:
            places = torch.arange(chunk.tokens, dtype=torch.int32, device=device)[None]
        else:
            places = chunk.visible.cumsum(-1, dtype=torch.int32) - 1
        lengths = torch.full((len(self.lengths), 1), self.lengths[0], dtype=torch.int32, device=device)
        if len(set(self.lengths)) > 1:
            lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)[:, None]
        return lengths + places

    def _pack(
        self,
        key: Tensor,
        value: Tensor,
        begins: list[int],
        real: list[int],
        tokens: int,
        most: list[int] | None = None,
    ) -> bool:
        """Packs the blocks that are complete, and leaves the rest in the tail.

        Args:
            key, value: what is not packed yet, each row's real tokens contiguous; for one token, what the tail holds.
            begins: where they begin.
            real: how many of them this forward brought.
            most: of how many blocks at most, for each row; None: of all.

        Returns:
            Whether there were any.
        """
        tail, block = self.tail, self.settings.buffer
        assert tail is not None
        totals = tail.held if tokens == 1 else [held + fresh for held, fresh in zip(tail.held, real, strict=True)]
        # a row that was fed nothing stays as it is
        apart = [
            min(lacks, total) if fresh else 0 for lacks, total, fresh in zip(self.lacking(), totals, real, strict=True)
        ]
        if any(apart):
            self._set_apart(key, value, begins, apart, totals)
            begins = [begin + count for begin, count in zip(begins, apart, strict=True)]
            totals = [total - count for total, count in zip(totals, apart, strict=True)]
        ready = [
            max(0, total - (fresh if 1 < fresh <= self.draft else 0)) // block if fresh else 0
            for total, fresh in zip(totals, real, strict=True)
        ]
        if most is not None:
            ready = [min(count, limit) for count, limit in zip(ready, most, strict=True)]
        for of_prompt in (True, False):
            # what decoding packs has its own rank; a row decides as it would alone
            here = [count if (fresh > 1) == of_prompt else 0 for count, fresh in zip(ready, real, strict=True)]
            if any(here):
                self._append(key, value, begins, here, totals, real, of_prompt)
        if any(ready) or tokens > 1:
            first = [begin + count * block for begin, count in zip(begins, ready, strict=True)]
            rest = [total - count * block for total, count in zip(totals, ready, strict=True)]
            own = [early + count * block for early, count in zip(apart, ready, strict=True)]
            tail.refill(key, value, first, rest, self.lengths, own)
        if any(ready) and self.window is not None:
            self._drop_old(real)
        return any(ready)

    def _set_apart(self, key: Tensor, value: Tensor, begins: list[int], apart: list[int], totals: list[int]) -> None:
        """Keeps the next `apart` tokens of each row, of `totals` that are not packed, among its first ones."""
        first = self.first
        assert first is not None
        counts = zip(begins, first.held, self.lengths, totals, strict=True)
        starts = [(begin, held, length - total) for begin, held, length, total in counts]
        moves = [(row, *(x + n for x in starts[row])) for row, count in enumerate(apart) for n in range(count)]
        row, source, target, place = (torch.tensor(each, device=key.device) for each in zip(*moves, strict=True))
        first.keys[row, :, target] = key[row, :, source]
        first.values[row, :, target] = value[row, :, source]
        first.positions[row, target] = place.to(torch.int32)
        first.held = [held + count for held, count in zip(first.held, apart, strict=True)]

    def _append(
        self,
        key: Tensor,
        value: Tensor,
        begins: list[int],
        ready: list[int],
        totals: list[int],
        real: list[int],
        of_prompt: bool,
    ) -> None:
        block = self.settings.buffer
        first = [length - total for length, total in zip(self.lengths, totals, strict=True)]
        skip = 0
        if self.window is not None:
            # tokens of a long chunk that no later query sees are not packed at all
            reach = self._reach(real)
            skip = min(max(0, min((r - f) // block, n)) for r, f, n in zip(reach, first, ready, strict=True) if n)
        rows = [row for row, count in enumerate(ready) if count > skip]
        shifts = None if self.codec is None else self.padding.shifts(len(ready))
        if rows:
            self._target((key, value), of_prompt).append(
                key,
                value,
                [begins[row] + skip * block for row in rows],
                [first[row] + skip * block for row in rows],
                [ready[row] - skip for row in rows],
                rows,
                None if shifts is None else [shifts[row] for row in rows],
            )

    def _target(self, like: tuple[Tensor, Tensor], of_prompt: bool) -> QuantizedBlocks:
        """Where tokens like these keys and values are packed."""
        settings, (head_dim, value_dim) = self.settings, (x.shape[-1] for x in like)
        if self.prompt is None:
            how = settings.buffer, settings.hadamard, self.codec
            self.prompt = QuantizedBlocks(settings.codings(head_dim, settings.rank, value_dim), *how)
            self.decoded = self.prompt
            if settings.rank_decode != settings.rank:
                self.decoded = QuantizedBlocks(settings.codings(head_dim, settings.rank_decode, value_dim), *how)
        assert self.decoded is not None
        return self.prompt if of_prompt else self.decoded

    def _reach(self, real: list[int]) -> list[int]:
        """Positions below which no later query of a sliding layer looks, however much of this forward is taken back.

        Of a row's first forward, a prompt, at most a draft is taken back, unless drafts of any length come with it.
        """
        assert self.window is not None
        behind = [
            self.draft if fresh == n and not self.record_past else max(self.draft, fresh)
            for fresh, n in zip(real, self.lengths, strict=True)
        ]
        return [length - self.window - back for length, back in zip(self.lengths, behind, strict=True)]

    def _drop_old(self, real: list[int]) -> None:
        """Drops the blocks that have left a sliding window, even if drafts are then taken back."""
        for part in self._packed():
            ends = part.positions[:, 0].unflatten(1, (-1, part.block)).amax(-1)
            reach = torch.tensor(self._reach(real), device=ends.device)[:, None]
            number = torch.arange(ends.shape[1], device=ends.device)
            held = number < torch.tensor(part.blocks, device=ends.device)[:, None]
            gone = (held & (ends < reach)).sum(-1).tolist()
            if any(gone):
                part.keep(gone, part.blocks)

    def _remap(self, remap: Tensor) -> None:
        tail = self.tail
        assert tail is not None
        self._is_ready = False
        device = tail.positions.device
        for segment in self._packed():
            segment.positions = moved(segment.positions, remap)
        if self.first is not None:
            self.first.positions = moved(self.first.positions, remap)
        self.lengths = (remap != EMPTY).sum(-1).tolist()
        tail.remap(remap, self.lengths)
        if self.window is not None:
            warn_of_short_windows(self.window, torch.tensor(self.lengths, device=device), self.tokens_kept()[:, 0])

    def check_crop(self, tokens: int) -> None:
        if tokens and self.tail is not None:
            self._left_by(tokens)

    def _left_by(self, tokens: int) -> list[int]:
        """How many tokens each row has after a crop.

        Raises:
            ValueError: more tokens than were seen, or tokens that the rest would attend to have left the window.
        """
        if tokens > self.clock.seen:
            raise ValueError(f"crop can take back the {self.clock.seen} tokens seen, got {tokens}")
        fresh = self.padding.real_of_last(tokens, self.clock.seen) or [tokens] * len(self.lengths)
        lengths = [length - count for length, count in zip(self.lengths, fresh, strict=True)]
        if self.window is not None:
            oldest = [n - kept for n, kept in zip(self.lengths, self.tokens_kept()[:, 0].tolist(), strict=True)]
            # beyond what the window already lacks where recent tokens were hidden
            room = [
                count if before == 0 else max(0, n - self.window + 1 - before)
                for n, count, before in zip(self.lengths, fresh, oldest, strict=True)
            ]
            if any(count > most for count, most in zip(fresh, room, strict=True)):
                raise ValueError(
                    f"crop can take back {min(room)} tokens of a layer with a sliding window of {self.window} here, "
                    f"got {tokens}: older ones have left the window"
                )
        return lengths

    def _crop(self, tokens: int) -> None:
        tail = self.tail
        assert tail is not None
        self._is_ready = False
        lengths = self._left_by(tokens)
        held = [max(0, count - before + n) for count, before, n in zip(tail.held, self.lengths, lengths, strict=True)]
        left = [part.cut(lengths) for part in self._packed()]
        if self.first is not None:
            self.first.keep_below(lengths)
        if any(any(counts) for _, _, counts in left):
            # each row's newest tokens are in one of these, at its beginning
            of_tail = tail.contents(max(tail.held))
            first, own, key, value = [0] * len(held), [0] * len(held), [of_tail[0]], [of_tail[1]]
            for of_key, of_value, counts in left:
                start = sum(part.shape[2] for part in key)
                first = [start if count else at for count, at in zip(counts, first, strict=True)]
                own = [had if count else at for count, had, at in zip(counts, tail.held, own, strict=True)]
                held = [count or before for count, before in zip(counts, held, strict=True)]
                key, value = [*key, of_key.to(key[0].dtype)], [*value, of_value.to(value[0].dtype)]
            tail.refill(torch.cat(key, 2), torch.cat(value, 2), first, held, lengths, own)
            self.draft = max(self.draft, 2 * tokens)
        else:
            tail.drop_last([count - own for count, own in zip(tail.held, held, strict=True)])
        self.lengths = lengths

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.tail is None:
            return {}, {}
        named = [("tail", self.tail), ("first", self.first), ("prompt", self.prompt)]
        if self.decoded is not self.prompt:
            named.append(("decoded", self.decoded))
        tensors: dict[str, Tensor] = {}
        for name, part in named:
            if part is not None and not (isinstance(part, QuantizedBlocks) and not part.blocks):
                tensors |= {f"{name}.{key}": tensor for key, tensor in part.dump()[0].items()}
        told = {"lengths": self.lengths, "draft": self.draft, "dtype": str(self.dtype).removeprefix("torch.")}
        facts = super().dump()[1] | told | self.tail.dump()[1]
        return tensors, facts | ({} if self.first is None else {"first": self.first.held})

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if not tensors:
            return
        super().restore(tensors, facts)
        of_tail = under("tail.", tensors)
        if "codes" in of_tail:
            coding = self.settings.tail_coding(of_tail["codes"].shape[-1])
            how = {"coding": coding, "rotates": self.settings.hadamard, "dtype": getattr(torch, facts["dtype"])}
            self.tail = PackedTail.load(of_tail, facts, **how)
        else:
            self.tail = TailSegment.load(of_tail, facts)
        self.lengths = list(facts["lengths"])
        self.draft = facts.get("draft", self.draft)
        like = self.tail.like()
        if "first" in facts:
            self.first = TailSegment.load(under("first.", tensors), {"held": facts["first"]})
        elif self.sinks:
            # it was made when a block was
            self.first = TailSegment(*like, self.sinks)
        self.lazy_initialization(*like)
        for name in ("prompt", "decoded"):
            if part := under(f"{name}.", tensors):
                target = self._target(like, name == "prompt")
                how = {name: getattr(target, name) for name in ("codings", "block", "rotates", "codec")}
                loaded = QuantizedBlocks.load(part, facts, **how)
                vars(target).update(vars(loaded))


def nothing_seen(chunk: AttentionInput) -> list[tuple[Tensor, Tensor]]:
    """What a single token attends to where nothing is held, as in a row that is all padding, alone: zeros, and their
    log-sum-exp; of several tokens no answer."""
    if chunk.tokens > 1:
        return []
    shape = chunk.query.shape[:3]
    nothing = chunk.query.new_full(shape, -torch.inf, dtype=torch.float32)
    return [(chunk.query.new_zeros(*shape, chunk.value.shape[-1]), nothing)]


def pieces_of(part: Segment) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a segment holds, decoded some tokens at a time: keys, values, and positions [batch, 1, tokens]."""
    if not isinstance(part, QuantizedBlocks):
        if any(part.held):  # type: ignore[attr-defined]
            yield from part.pieces()
        return
    step = max(1, _PIECE // part.block)
    for first in range(0, max(part.blocks), step):
        yield part.some(slice(first, min(first + step, max(part.blocks))))


class IndexedQuantizedLayer(IndexBeside, QuantizedLayer):
    """Packed keys and values of many heads, and what an indexer scores beside them.

    Where it has chosen, a step decodes what is held, some blocks at a time, and attends to those of the tokens.
    """

    reserves_on_gpu = False

    def is_traceable(self, tokens: int) -> bool:
        return False

    def _begin(self, x: AttentionInput) -> ForwardStep:
        return StepBeside(self, x)

    def _past(
        self, chunk: AttentionInput, query_positions: Tensor, joins: list[int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        if chunk.chosen is None:
            return super()._past(chunk, query_positions, joins)
        pieces = (piece for part in QuantizedLayer.segments(self) for piece in pieces_of(part))
        # decoded in float32
        answers = [
            sparse_attention(chunk.query, key, value, at[:, 0].to(torch.int32), chunk.chosen, chunk.spec)
            for key, value, at in pieces
        ]
        if joins is not None:
            at = numbers(self._of_token(joins), chunk.key.device)[:, None]
            answers.append(sparse_attention(chunk.query, chunk.key, chunk.value, at, chunk.chosen, chunk.spec))
        return answers or nothing_seen(chunk)
