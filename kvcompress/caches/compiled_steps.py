"""Steps of a compiled model into buffers with room: what changes from step to step is counted on the device."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_attention, slot_attention
from kvcompress.kernels.merge import joint_output, output_of
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.packed_tail import PackedTail
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.tail import TailSegment, numbers

Places = tuple[Tensor, Tensor, Tensor]


class CompiledSteps:
    """Where the next tokens of a segment go, in tensors that stay where they are, as CUDA graphs need it.

    positions: [batch, room] int32, of each column's token in its own sequence; EMPTY for padding and for room.
    lengths: [batch] int32, real tokens held. column: [1] int64, which column comes next.
    """

    def __init__(self, segment: DenseSegment | TailSegment, places: Places) -> None:
        """
        Args:
            segment: whose keys and values the steps write to.
            places: positions, lengths and column as they are now.
        """
        self.segment = segment
        self.positions, self.lengths, self.column = places
        self.pin()

    def tensors(self) -> list[Tensor]:
        return [self.positions, self.lengths, self.column]

    def pin(self) -> None:
        """Tells the compiler that tensors stay where they are."""
        pin(*self.segment.tensors().values(), *self.tensors())

    def catch_up(self, places: Places) -> None:
        """Counts anew, after the segment was changed by other means."""
        if [each.shape for each in places] != [each.shape for each in self.tensors()]:
            self.positions, self.lengths, self.column = places
        else:
            for held, fresh in zip(self.tensors(), places, strict=True):
                if held is not fresh:
                    held.copy_(fresh)
        self.pin()

    def store(self, x: AttentionInput) -> None:
        """Writes a token, with which `attend` counts from now on; RuntimeError: there is no room."""
        self._check_room()
        self.segment.write(self.column, x.key, x.value)
        self._place(x)

    def _check_room(self) -> None:
        torch._assert_async(
            (self.column < self.positions.shape[1]).all(),
            "a compiled step has no room for its token: call cache.reserve() with as many steps as will come",
        )

    def _place(self, x: AttentionInput) -> None:
        """Makes the token visible."""
        at = self.lengths if x.visible is None else torch.where(x.visible[:, 0], self.lengths, EMPTY)
        self.positions.index_copy_(1, self.column, at[:, None])

    def attend(self, x: AttentionInput) -> tuple[Tensor, Tensor]:
        """Attention of one token to all that is held, its own among it, and the log-sum-exp."""
        assert not isinstance(self.segment, PackedTail)
        keys = self.segment.keys
        positions = self.positions[:, None].expand(keys.shape[:3])
        return slot_attention(x.query, keys, self.segment.values, positions, self.lengths[:, None], x.spec)

    def answers(self, x: AttentionInput) -> list[tuple[Tensor, Tensor]]:
        """What `attend` gives, in as many parts as it takes."""
        return [self.attend(x)]

    def output(self, x: AttentionInput) -> Tensor:
        """The output of a layer that holds nothing else, with learned sink logits, [batch, heads, 1, head_dim]."""
        return output_of(*self.attend(x), x.sinks)

    def count(self, x: AttentionInput) -> None:
        """Counts the token that `store` wrote."""
        self.lengths.add_(x.real_tokens)
        self.column.add_(1)


class PackedSteps(CompiledSteps):
    """Steps into a tail that packs: a token is attended to as it came by itself, and as it is stored by later ones."""

    segment: PackedTail

    def store(self, x: AttentionInput) -> None:
        self._check_room()
        self.segment.write(self.column, x.key, x.value)

    def answers(self, x: AttentionInput) -> list[tuple[Tensor, Tensor]]:
        past = self.segment.attend(x.query, self.lengths[:, None], x.spec)
        return [past, causal_attention(x.query, x.key, x.value, x.spec, x.visible)]

    def count(self, x: AttentionInput) -> None:
        self._place(x)
        super().count(x)


class FirstSteps:
    """Where those of a row's next tokens go that stay apart from the tail, until there are enough of them.

    slots: [batch] int32, which slot of the segment comes next; its room where it is full.
    """

    def __init__(self, segment: TailSegment) -> None:
        self.segment = segment
        self.slots = numbers(segment.held, segment.positions.device)
        pin(self.slots)

    def store(self, x: AttentionInput, lengths: Tensor) -> Tensor:
        """Writes the tokens that belong here; returns which rows' do, [batch] bool.

        Args:
            lengths: [batch] int32, the tokens' positions.
        """
        segment, room = self.segment, self.segment.room
        comes = self.slots < room
        if x.visible is not None:
            comes = comes & x.visible[:, 0]
        # [batch, room]
        here = comes[:, None] & (torch.arange(room, device=comes.device) == self.slots[:, None])
        for held, fresh in ((segment.keys, x.key), (segment.values, x.value)):
            held.copy_(torch.where(here[:, None, :, None], fresh, held))
        segment.positions.copy_(torch.where(here, lengths[:, None], segment.positions))
        self.slots.add_(comes)
        return comes

    def take_in(self) -> list[int]:
        """Counts what was written, and returns how many tokens each row has taken."""
        held = self.slots.tolist()
        counts = [now - before for now, before in zip(held, self.segment.held, strict=True)]
        self.segment.held = held
        return counts


class CompiledTailStep(ForwardStep):
    """A token that a compiled model feeds: it joins the tail, behind segments that stay as they are, or the first
    tokens of its row, as long as those are too few."""

    def __init__(
        self, steps: CompiledSteps, parts: list[Segment], x: AttentionInput, first: FirstSteps | None = None
    ) -> None:
        """
        Args:
            first: of the segment in `parts` that some row's next tokens belong to; None: there are none.
        """
        super().__init__(x)
        self.steps = steps
        self.parts = parts
        self.early: Tensor | None = None
        if first is not None:
            self.early = first.store(x, steps.lengths)
        steps.store(self._for_the_tail(x))

    def _for_the_tail(self, x: AttentionInput) -> AttentionInput:
        """The token, as padding in rows where it is among the first."""
        if self.early is None:
            return x
        late = ~self.early[:, None]
        return dataclasses.replace(x, visible=late if x.visible is None else x.visible & late)

    def attend(self, x: AttentionInput) -> Tensor:
        places = self.steps.lengths[:, None]
        answers = [part.attend(x.query, places, x.spec) for part in self.parts]
        answers += self.steps.answers(self._for_the_tail(x))
        return joint_output(answers, x.sinks)

    def commit(self) -> None:
        self.steps.count(self._for_the_tail(self.input))
        if self.early is not None:
            self.steps.lengths.add_(self.early)


def pin(*tensors: Tensor) -> None:
    """Tells the compiler that tensors stay where they are: else CUDA graphs copy them, and refuse to write to them."""
    for tensor in tensors:
        # unguarded: another cache of the same shapes records a graph, and compiles nothing
        torch._dynamo.mark_static_address(tensor, guard=False)


class SteppedLayer(CompressedLayer):
    """A layer whose compiled steps write where tensors on the device say, so that the host learns of them afterwards.

    Subclasses define `_make_ready` and `_take_in`, and look (`_look`) before they read or change what they hold.
    """

    # whether steps on a GPU are compiled without reserve()
    reserves_on_gpu = False
    # where compiled steps write; columns seen when they were last counted; whether nothing else has come since
    steps: type[CompiledSteps] = CompiledSteps
    _steps: CompiledSteps | None = None
    _counted = 0
    _is_ready = False
    # steps asked for at a time, 0: none are compiled; those that may come until there is more to make ready
    _reserved = 0
    _left = 0

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self._reserved > 0 or self.reserves_on_gpu

    def is_traceable(self, tokens: int) -> bool:
        # the steps' positions are of what is held, and do not tell chunks apart
        return tokens == 1 and self._steps is not None and not self.is_chunked and not self.has_biases

    def reserve(self, steps: int | None) -> None:
        """Takes room for so many steps that are compiled, and as many whenever that is used up."""
        self._reserved = steps or DenseSegment.growth
        self._make_ready(self._reserved)

    def forward_comes(self) -> None:
        """Called by generate before a forward, outside of what it compiles."""
        if self.reserves_on_gpu and self.is_initialized and self.device.type == "cuda":
            self._reserved = self._reserved or DenseSegment.growth
        if not self._reserved:
            return
        if not (self._is_ready and self._left):
            self._make_ready(1)
        self._left -= 1

    def _make_ready(self, steps: int) -> None:
        """Lets so many compiled steps follow on what is held, where it holds something."""
        raise NotImplementedError

    def _take_in(self, written: int) -> None:
        """Tells the host of so many tokens that compiled steps wrote, of which it knows nothing else."""
        raise NotImplementedError

    def _look(self) -> None:
        """Takes in what compiled steps have written since it was last asked for."""
        if self._steps is None or not self._is_ready or torch.compiler.is_compiling():
            return
        written = self.clock.seen - self._counted
        if written:
            self._counted += written
            self._take_in(written)

    def _count_on(self, segment: DenseSegment | TailSegment, places: Places) -> None:
        """Compiled steps may now write to the segment."""
        if self._steps is None:
            self._steps = self.steps(segment, places)
        else:
            self._steps.catch_up(places)
        if self.clock.tensor is None:
            seen = self.clock.seen
            counted = torch.full((), seen, dtype=torch.int64, device=places[0].device)
            pin(counted)
            self.clock.count_on(counted, seen)
        self._counted, self._is_ready = self.clock.seen, True

    def _is_followed(self) -> bool:
        """Whether a compiled step may follow on what is held."""
        return self._is_ready

    def _ready_steps(self) -> CompiledSteps:
        """Where a compiled step writes; RuntimeError if it follows on what was not compiled."""
        if self._steps is None or not self._is_followed():
            raise RuntimeError(
                "a compiled step must follow on compiled steps, or on cache.reserve(steps), which makes room for "
                "as many: call it anew after a forward that was not compiled, and after crop"
            )
        return self._steps

    def counters(self) -> dict[str, Tensor]:
        if self._steps is None or self.clock.tensor is None:
            return {}
        positions, lengths, column = self._steps.tensors()
        return {"positions": positions, "lengths": lengths, "column": column, "seen": self.clock.tensor}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        if self._is_ready:
            self._make_ready(0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._is_ready:
            # room may have gone with the rows
            self._make_ready(0)


class TailedLayer(SteppedLayer):
    """A layer whose newest tokens lie in a tail, where compiled steps write them."""

    _tail: TailSegment | None = None

    @property
    def tail(self) -> TailSegment | None:
        """The newest tokens; None where there are none."""
        self._look()
        return self._tail

    @tail.setter
    def tail(self, segment: TailSegment | None) -> None:
        self._tail, self._steps = segment, None
