"""One layer of an evicting cache: how tokens enter its slots, are scored, and are evicted (caches/evicting.py)."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompress.caches.allotment import Allotment
from kvcompress.caches.evicting_step import ChunkStep, DecodeStep, FusedDecodeStep
from kvcompress.caches.pins import Pins
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.kernels.common.runtime import attends_in_triton
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep
from kvcompress.policies.gear import GEAR
from kvcompress.policies.method import is_own
from kvcompress.policies.policy import Policy
from kvcompress.storage.indexed import IndexedSlots, RaggedIndexedSlots
from kvcompress.storage.latent import LatentSlots, RaggedLatentSlots
from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.quantized_slots import QuantizedSlots
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.ragged_packed import RaggedPackedSlots
from kvcompress.storage.rerotated import RaggedRerotatedSlots, RerotatedSlots
from kvcompress.storage.rope import Rope
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.slots import SlotSegment

_COUNTERS = ("lengths", "limits", "recents")
# slots are added at least so many at a time, or one for every so many that exist
_GROWTH, _SHARE = 8, 16
_FOREVER = -1


class EvictingLayer(CompressedLayer):
    """One layer's slots, and the policy that decides which tokens stay."""

    is_compileable = True
    evicts = True
    pads_first = True
    takes_spans = True
    # a token that is fed alone evicts none
    keeps_answers = False
    # slots have log-weights
    _fits = False
    _reserves = False
    _told = False

    def __init__(
        self,
        padding: PaddingRecord,
        policy: Policy,
        budget: int | float,
        window: int | None = None,
        is_first: bool = False,
        rope: Rope | None = None,
        packed: GEAR | None = None,
        ranks: TPGroup | None = None,
        competes: bool = False,
        allotment: Allotment | None = None,
        output_projection: Callable[[Tensor], Tensor] | None = None,
        pins: Pins | None = None,
    ) -> None:
        """
        Args:
            policy: what to keep.
            budget: tokens kept per sequence and KV head, or a fraction of the real tokens seen so far.
            padding, window, is_first: as in CompressedLayer.
            rope: the layer's rotary embedding, if the policy uses it.
            packed: how slots are encoded; None for unpacked.
            ranks: the processes that share the layer's heads; None if this one has them all.
            competes: heads compete for the budget, and keep different numbers of tokens.
            allotment: what heads get where their shares of the budget are fixed; None where they are not.
            output_projection: gives the weight behind the layer's attention, [heads, value_dim, hidden], for values
                like a tensor; None if the policy has no second stage.
            pins: tokens that stay whatever they score, which the cache's layers have in common; None: there are none.
        """
        super().__init__(padding, window, is_first)
        self.ranks = ranks
        self.policy = policy
        self.scores_are_finite = is_own(type(policy))
        self.budget = budget
        self.rope = rope
        self.packed = packed
        self.slots: SlotSegment | None = None
        self.state: dict[str, Tensor] = {}
        # per sequence: real tokens so far, tokens it may keep, newest tokens it always keeps; the last per head where
        # shares are fixed, [batch, kv_heads]
        self.lengths: Tensor
        self.limits: Tensor
        self.recents: Tensor
        # whether there are slots for the whole budget, if it is a count
        self._holds_budget = False
        self.competes = competes
        self.allotment = allotment
        self.output_projection = output_projection
        self.pins = pins
        self.pinned = 0 if pins is None else pins.most
        # where heads differ: what each may keep beyond its sequence's limit, [batch, kv_heads] int32
        self.surplus: Tensor | None = None
        # what sequences may keep on average instead of the budget, [batch], while they are compacted to something else
        self._granted: Tensor | None = None
        # steps that may come until a head that is below its limit needs room
        self._steps_left = 0

    @property
    def queries_watched(self) -> int | None:  # type: ignore[override]
        return self.policy.queries_needed

    @property
    def is_ragged(self) -> bool:
        """Whether heads may hold different numbers of tokens."""
        return self.competes or self.allotment is not None

    @property
    def least_budget(self) -> int:
        """The smallest budget in tokens that leaves the policy a choice."""
        return self.policy.least_budget() + self.pinned

    @property
    def _mean_over_ranks(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.ranks is None else self.ranks.mean

    def segments(self) -> list[Segment]:
        return [] if self.slots is None else [self.slots]

    def counters(self) -> dict[str, Tensor]:
        if self.clock.tensor is None:
            return {}
        return {
            "counters": self.lengths,
            "limits": self.limits,
            "recents": self.recents,
            "seen": self.clock.tensor,
            **({} if self.surplus is None else {"surplus": self.surplus}),
            **({} if self.allotment is None else self.allotment.tensors()),
            **({} if self.pins is None or not self.is_first else self.pins.tensors()),
        } | ({} if self.rope is None else {"inv_freq": self.rope.inv_freq})

    def statistics(self) -> dict[str, Tensor]:
        return self.state

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        if self.slots is not None:
            self.lengths, self.limits, self.recents = change(self.lengths), change(self.limits), change(self.recents)
            self.surplus = None if self.surplus is None else change(self.surplus)
            self.state = {name: change(tensor) for name, tensor in self.state.items()}
            if self.pins is not None and self.is_first:
                self.pins.map_rows(change)
            self._mark_static()

    def tokens_kept(self) -> Tensor:
        assert self.slots is not None
        return self.slots.kept()

    def tokens_of_all_heads(self) -> Tensor:
        """`tokens_kept`, [batch, kv_heads] int64, with the heads that other processes have."""
        kept = self.tokens_kept()
        return kept if self.ranks is None else self.ranks.all_heads(kept[..., None], 0)[..., 0]

    def held_positions(self) -> Tensor:
        """The positions of the tokens held, [batch, kv_heads, any] int32, EMPTY for none."""
        assert self.slots is not None
        return self.slots.positions

    def is_traceable(self, tokens: int) -> bool:
        return self.slots is not None and tokens == 1 and not self.has_biases

    def reset(self) -> None:
        super().reset()
        self.slots = self.surplus = None
        self.state = {}
        if self.pins is not None and self.is_first:
            self.pins.reset()

    def check_crop(self, tokens: int) -> None:
        if tokens > 0:
            raise ValueError(
                f"{type(self.policy).__name__} cannot take back {tokens} tokens: others were evicted for them; "
                "use DenseCache for assisted or prompt-lookup decoding, or clone() the cache first"
            )

    def _remap(self, remap: Tensor) -> None:
        assert self.slots is not None
        if self.is_first:
            self._warn_of_filler(remap)
            if self.pins is not None:
                self.pins.remap(remap)
        positions = self.slots.positions
        rows = remap[:, None].expand(-1, positions.shape[1], -1)
        moved = rows.gather(2, positions.clamp(min=0).long())
        positions.copy_(torch.where(positions == EMPTY, EMPTY, moved))
        self.slots.spare.copy_(positions.argmin(-1))
        self.lengths.copy_((remap != EMPTY).sum(-1))

    def _warn_of_filler(self, remap: Tensor) -> None:
        """Warns of rows that evicted tokens for others that the mask now hides."""
        hidden = self.lengths - (remap != EMPTY).sum(-1).to(self.lengths.device)
        lost = hidden.minimum(self.lengths - self.limits)
        if bool((lost > 0).any()):
            warnings.warn(
                f"attention_mask hides tokens that it showed when they were fed: up to {int(lost.max())} others were "
                f"evicted for them in {int((lost > 0).sum())} of {len(lost)} sequences, and are gone. To mark rows "
                "that have ended, set model.generation_config.pad_token_id, or pass a mask of 0 for what they are fed",
                stacklevel=2,
            )

    def _begin(self, x: AttentionInput) -> ForwardStep:
        self._note_pins(x)
        if self.slots is None or x.tokens > 1:
            return ChunkStep(self, x)
        self._make_room(1)
        if isinstance(self.budget, float):
            self._follow_budget(self.lengths + x.real_tokens)
        # one kernel does it for scores that add up or decay, over plain slots; not if other layers share the tokens
        plain = self.rope is None and self.packed is None and not self.kv_consumers and not self.is_ragged
        plain = plain and self.pins is None and self.latent_rank is None and not self.is_chunked and x.biases is None
        plain = plain and not self.is_indexed
        at_once = self.policy.decay is not None and plain and attends_in_triton(x.query)
        return FusedDecodeStep(self, x) if at_once else DecodeStep(self, x)

    def _note_pins(self, x: AttentionInput) -> None:
        """Takes in which tokens of a forward stay, once for all layers."""
        if self.pins is not None and self.is_first and not torch.compiler.is_compiling():
            lengths = None if self.slots is None else self.lengths
            self.pins.note(self.get_seq_length(), x.tokens, lengths, x.visible, x.key)

    def _shift(self) -> Tensor | None:
        """What `_place` is told of the slots before a forward: how far queries are moved up, [batch, 1]; None: not."""
        return None

    def out_of_sight(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Which tokens the next query of sequences of these lengths does not see; lengths: broadcastable."""
        assert self.window is not None
        return positions <= self.reaches(lengths) - self.window

    def _scored(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor]:
        slots = self.slots
        if not isinstance(slots, IndexedSlots | RaggedIndexedSlots):
            return super()._scored(x)
        return slots.index_keys(), slots.positions, self.lengths

    def _place(
        self, chunk: AttentionInput, query_positions: Tensor, shift: Tensor | None
    ) -> tuple[AttentionInput, Tensor]:
        """The chunk rotated to match the slots' `rotated_keys`, and its queries' positions then, [batch, queries]."""
        return chunk, query_positions

    def _mark_static(self) -> None:
        """Tells the compiler that the layer's tensors stay where they are; else CUDA graphs refuse to write to them."""
        assert self.slots is not None
        # checked here: torch 2.11 fails to compare with a budget that differs from the previously compiled cache's
        holds = self._steps_left == _FOREVER if self.is_ragged else self.slots.slots > self._limit(0)
        self._holds_budget = not isinstance(self.budget, int) or holds
        for tensor in (*self.slots.tensors().values(), *self.counters().values(), *self.state.values()):
            # unguarded: another cache of the same shapes records a graph, and compiles nothing
            torch._dynamo.mark_static_address(tensor, guard=False)

    def _allocate(self, chunk: AttentionInput) -> SlotSegment:
        if self.slots is None:
            batch, device = chunk.key.shape[0], chunk.key.device
            self.limits, self.lengths = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
            self.clock.count_on(torch.zeros((), dtype=torch.int64, device=device), 0)
            # generate compiles the decode step on a GPU
            self._reserves |= chunk.key.is_cuda
            self.slots = self._new_slots(chunk, 1 if self.is_ragged else self._most_slots(chunk.tokens))
            self.recents, of_heads = torch.zeros_like(self.limits), self.limits.new_zeros(chunk.key.shape[:2])
            self.surplus = of_heads if self.competes or self.allotment is not None else None
            if self.allotment is not None:
                self.allotment, self.recents = self.allotment.to(device), torch.zeros_like(of_heads)
            self._follow_budget(self.lengths)
        self._make_room(chunk.tokens)
        return self.slots

    def reserve(self, steps: int | None) -> None:
        """Allocates the whole budget, if it is a count, now or with the first forward, for any number of steps."""
        self._reserves = True
        if self.slots is not None:
            self._make_room(0)
            self._note_rest_of_pins()

    def forward_comes(self) -> None:
        super().forward_comes()
        # generate compiles its steps on a GPU
        if self.slots is not None and self._reserves:
            self._note_rest_of_pins()

    def _note_rest_of_pins(self) -> None:
        if self.pins is not None and self.is_first:
            self.pins.note_rest(self.get_seq_length(), self.lengths, self.padding.visible)

    def _limit(self, tokens: int) -> int:
        """How many tokens a sequence of this length may keep."""
        limit = self.budget if isinstance(self.budget, int) else int(self.budget * tokens)
        limit = max(limit, self.least_budget)
        return limit if self.window is None else min(limit, self.window)

    def _most_slots(self, tokens: int) -> int:
        """How many slots are enough after so many more tokens, with a free one."""
        seen = self.get_seq_length() + tokens
        if self._reserves and isinstance(self.budget, int):
            return self._limit(seen) + 1
        return min(self._limit(seen), seen) + 1

    def _make_room(self, tokens: int) -> None:
        """Adds the slots that so many more tokens need.

        Raises:
            RuntimeError: the step is compiled, and cannot grow them.
        """
        slots = self.slots
        assert slots is not None
        if torch.compiler.is_compiling():
            if not self._holds_budget:
                raise RuntimeError(
                    f"a compiled step cannot grow its cache, and there is room for {slots.slots - 1} of the budget of "
                    f"{self._limit(0)} tokens: call cache.reserve() before compiling"
                )
            return
        if isinstance(slots, RaggedSlots):
            # a chunk's tokens get room when it is known which of them stay
            if tokens <= 1:
                self._room_for_steps(slots, tokens)
            return
        needed = self._most_slots(tokens)
        if needed > slots.slots:
            # never more than will be needed
            enough = self._limit(2**40) + 1
            grown = slots.slots + max(_GROWTH, slots.slots // _SHARE) if tokens == 1 else needed
            slots.grow(min(max(needed, grown), enough))
            self._mark_static()

    def _follow_budget(self, lengths: Tensor) -> None:
        """Sets how many tokens sequences of these lengths, [batch], may keep, and how many newest ones always stay."""
        assert self.slots is not None
        least = self.least_budget
        if isinstance(self.budget, int):
            limits = torch.full_like(self.limits, self._limit(0))
        else:
            limits = (self.budget * lengths).int()
            if self.is_first and not self._told and not torch.compiler.is_compiling() and not lengths.is_cuda:
                self._warn_of_floor(limits, lengths, least)
            # limits never shrink; a compiled step cannot grow the slots
            limits = limits.clamp(min=least, max=self.window)
            if not self.is_ragged:
                limits = limits.clamp(max=self.slots.slots - 1)
            limits = limits.maximum(self.limits)
        self._set_limits(limits, lengths)

    def _set_limits(self, limits: Tensor, lengths: Tensor) -> None:
        self.limits.copy_(limits)
        if self.allotment is not None:
            assert self.surplus is not None
            self.surplus.copy_(self._allotted(lengths) - limits[:, None])
        self._set_recents()

    def _set_recents(self) -> None:
        recent, limits = self.policy.recent, self.limits if self.allotment is None else self.limits_by_head()
        limits = limits - self.pinned if self.pinned else limits
        recents = (limits * recent).int() if isinstance(recent, float) else torch.full_like(limits, recent)
        self.recents.copy_(recents.clamp(min=1).minimum(limits - self.policy.sinks))

    def _allotted(self, lengths: Tensor) -> Tensor:
        """How many tokens each head may keep of sequences of these lengths, [batch], where shares are fixed, whatever
        the layer's window: [batch, kv_heads] int32."""
        assert self.allotment is not None
        mean, least = self.nominal_limits(lengths), self.least_budget
        if isinstance(self.budget, float) and self._granted is None:
            return self.allotment.of_fraction(self.budget, mean, least)
        return self.allotment.of_count(mean, least, lengths)

    def follow_lengths(self, fresh: int | Tensor) -> None:
        """Sets what may be kept after a forward of several tokens, `fresh` [batch] of them in each sequence."""
        if isinstance(self.budget, float):
            self._follow_budget(self.lengths)
        elif self.allotment is not None:
            self.take_shares(self._allotted(self.lengths), fresh)
            self._set_recents()

    @contextlib.contextmanager
    def granting(self, tokens: Tensor) -> Iterator[None]:
        """Within it, heads may keep so many tokens on average, [batch] int32, instead of what the budget says."""
        own, recents = self.limits.clone(), self.recents.clone()
        self._granted = tokens
        self._set_limits(tokens.clamp(min=self.least_budget, max=self.window), self.lengths)
        try:
            yield
        finally:
            self._granted = None
            if self.surplus is not None:
                self.surplus += (self.limits - own)[:, None]
            self.limits.copy_(own)
            self.recents.copy_(recents)

    def limits_by_head(self) -> Tensor:
        """How many tokens each head may keep, [batch, kv_heads] int32; [batch, 1] where heads do not differ."""
        if self.surplus is None:
            return self.limits[:, None]
        limits = self.limits[:, None] + self.surplus
        return limits if self.window is None else limits.clamp(max=self.window)

    def nominal_limits(self, lengths: Tensor | None = None) -> Tensor:
        """How many tokens the heads of each sequence may keep on average, [batch], whatever the layer's window, if it
        has so many, or else as many as it has now."""
        if self._granted is not None:
            return self._granted
        lengths = self.lengths if lengths is None else lengths
        granted = self.budget if isinstance(self.budget, int) else (self.budget * lengths).int()
        return self.limits.clamp(min=granted)

    def take_shares(self, shares: Tensor, fresh: int | Tensor) -> None:
        """Lets each head keep so many tokens, [batch, kv_heads] int64, of sequences fed several, `fresh` [batch]: a
        single token goes where it would alone, in a step."""
        assert self.surplus is not None
        shares = shares - self.limits[:, None]
        self.surplus.copy_(shares if isinstance(fresh, int) else torch.where(fresh[:, None] > 1, shares, self.surplus))

    def refill(
        self, slots: RaggedSlots, key: Tensor, value: Tensor, places: Tensor, scores: Tensor, kept: Tensor
    ) -> None:
        """Keeps what was chosen of slots and chunk, as RaggedSlots.refill, with room for the next steps."""
        slots.refill(key, value, places, scores, kept, self._capacities(kept.sum(-1)))

    def _capacities(self, kept: Tensor) -> Tensor:
        """How many slots heads need that keep so many tokens, [batch, kv_heads] int64 on the CPU: for steps to come."""
        growth = max(_GROWTH, int(kept.max()) // _SHARE)
        limits, is_count = self.limits_by_head().long(), isinstance(self.budget, int)
        later = limits if is_count else limits + int(self.budget * growth) + 1
        if self.allotment is not None and not is_count:
            later = self._allotted(self.lengths + growth).long().clamp(min=0, max=self.window)
        # a compiled step must find room for what always stays
        least = limits.clamp(max=self.least_budget)
        wanted = limits if is_count and self._reserves else later.minimum(kept + growth).maximum(least)
        self._steps_left = _FOREVER if is_count and bool((wanted >= limits).all()) else growth
        return wanted.maximum(kept).cpu() + 1

    def _room_for_steps(self, slots: RaggedSlots, steps: int) -> None:
        if self._steps_left == 0 or steps == 0:
            capacities = self._capacities(slots.kept())
            if bool((capacities > slots.capacities.cpu()).any()):
                slots.resize(capacities)
            self._mark_static()
        self._steps_left -= 0 if self._steps_left == _FOREVER else steps

    def _warn_of_floor(self, limits: Tensor, lengths: Tensor, least: int) -> None:
        short = (limits < least) & (lengths > least)
        if bool(short.any()):
            self._told = True
            row = int(short.to(torch.uint8).argmax())
            warnings.warn(
                f"a budget of {self.budget:g} of {int(lengths[row])} tokens is {int(limits[row])}, too few to leave "
                f"{self.policy} a choice: {least} are kept as long as it is less",
                stacklevel=2,
            )

    def _new_slots(self, chunk: AttentionInput, slots: int) -> SlotSegment:
        if self.packed is not None:
            coding = self.packed.per_token_scheme(chunk.key.shape[-1], chunk.value.shape[-1])
            if self.is_ragged:
                return RaggedPackedSlots(chunk.key, chunk.value, slots, coding, self.packed.hadamard, self._fits)
            return QuantizedSlots(chunk.key, chunk.value, slots, coding, self.packed.hadamard)
        plain = self._plain_kind()(chunk.stored_key, chunk.value, slots, *((self._fits,) if self.is_ragged else ()))
        if isinstance(plain, IndexedSlots | RaggedIndexedSlots):
            plain.index_dim = self.index_dim
        return plain

    def _plain_kind(self) -> type[SlotSegment]:
        """The class of slots that are not packed."""
        if self.latent_rank is None and self.index_dim:
            return RaggedIndexedSlots if self.is_ragged else IndexedSlots
        if self.latent_rank is None:
            return RaggedSlots if self.is_ragged else SlotSegment
        return RaggedLatentSlots if self.is_ragged else LatentSlots

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.slots is None or self.clock.tensor is None:
            return {} if self.pins is None or not self.is_first else self.pins.tensors(), {}
        counters = {name: getattr(self, name) for name in _COUNTERS} | {"seen": self.clock.tensor}
        counters |= {} if self.surplus is None else {"surplus": self.surplus}
        facts = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.pins is not None and self.is_first:
            counters |= self.pins.tensors()
        return self.slots.tensors() | counters | {f"state.{name}": tensor for name, tensor in self.state.items()}, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.pins is not None and self.is_first:
            self.pins.restore(tensors)
        if "seen" in tensors:
            self.slots = self._load_slots(tensors, facts)
            for name in _COUNTERS:
                setattr(self, name, tensors[name])
            self.state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
            self.surplus, self._steps_left = tensors.get("surplus"), 0
            self.allotment = None if self.allotment is None else self.allotment.to(self.lengths.device)
            key, value = self.slots.like()
            self.lazy_initialization(key[..., : key.shape[-1] - self.index_dim], value)
            self.clock.count_on(tensors["seen"])
            self._mark_static()

    def _load_slots(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> SlotSegment:
        if self.packed is not None:
            coding = self.packed.per_token_scheme(*(tensors[f"{side}.codes"].shape[-1] for side in ("keys", "values")))
            how = {"coding": coding, "rotates": self.packed.hadamard, "dtype": getattr(torch, facts["dtype"])}
            return (RaggedPackedSlots if self.is_ragged else QuantizedSlots).load(tensors, facts, **how)
        how = {} if self.latent_rank is None else {"rank": self.latent_rank}
        how |= {"index_dim": self.index_dim} if self.index_dim else {}
        return self._plain_kind().load(tensors, facts, **how)


class RerotatedLayer(EvictingLayer):
    """An evicting layer that rotates keys to their index among the tokens kept."""

    @property
    def queries_watched(self) -> int | None:  # type: ignore[override]
        return None

    def _shift(self) -> Tensor | None:
        assert isinstance(self.slots, RerotatedSlots)
        return (self.slots.held() - self.lengths)[:, None]

    def _place(
        self, chunk: AttentionInput, query_positions: Tensor, shift: Tensor | None
    ) -> tuple[AttentionInput, Tensor]:
        rope = self.rope
        assert rope is not None
        assert shift is not None
        indices = query_positions + shift
        # float32 between the two rotations: one rounding instead of two
        query, key = (
            rope.rotate(rope.unrotate(x.float(), query_positions[:, None]), indices[:, None]).to(x.dtype)
            for x in (chunk.query, chunk.key)
        )
        return dataclasses.replace(chunk, query=query, key=key), indices

    def _new_slots(self, chunk: AttentionInput, slots: int) -> SlotSegment:
        assert self.rope is not None
        kind = RaggedRerotatedSlots if self.is_ragged else RerotatedSlots
        return kind(chunk.key, chunk.value, slots, self.rope)

    def _load_slots(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> SlotSegment:
        return (RaggedRerotatedSlots if self.is_ragged else RerotatedSlots).load(tensors, facts, rope=self.rope)
