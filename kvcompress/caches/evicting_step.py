"""A forward through a layer of an evicting cache: what its queries see, and which tokens are evicted at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.caches.competition import shares
from kvcompress.caches.spans import Spans, attend_ahead
from kvcompress.kernels.column_sums import causal_column_sums
from kvcompress.kernels.evict import choose_victim, ranked
from kvcompress.kernels.merge import merge_states, with_sinks
from kvcompress.kernels.sparse_attention import sparse_attention, sparse_column_sums
from kvcompress.layer import AttentionInput, ForwardStep
from kvcompress.policies.policy import Candidates
from kvcompress.policies.second_stage import has_second_stage, output_norms, second_scores
from kvcompress.storage.chunks import sums_in_chunks
from kvcompress.storage.distances import attend_by_distance, sums_by_distance
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.slots import SlotSegment

if TYPE_CHECKING:
    from kvcompress.caches.evicting_layer import EvictingLayer


_MOST = torch.finfo(torch.float32).max


class EvictingStep(ForwardStep):
    """A forward through a layer's slots."""

    def __init__(self, layer: "EvictingLayer", x: AttentionInput) -> None:
        super().__init__(x)
        assert layer.slots is not None
        self.layer = layer
        self.slots: SlotSegment = layer.slots
        # the attention that the policy scores by is the mean over the layers that share the tokens
        self.part = 1 / (1 + layer.kv_consumers)
        # before the tokens come, as queries that share them come later
        self.shift = layer._shift()

    def _columns_held(self, query_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the slots' tokens and of queries the columns by which biases go."""
        columns = self.layer.padding.columns
        return columns(self.slots.positions), columns(query_positions)


class DecodeStep(EvictingStep):
    """One token: it takes the free slot, and attention is to the slots alone."""

    def __init__(self, layer: "EvictingLayer", x: AttentionInput) -> None:
        super().__init__(layer, x)
        # position of the token in each sequence, [batch] int32; EMPTY for padding
        self.at = layer.lengths if x.visible is None else torch.where(x.visible[:, 0], layer.lengths, EMPTY)
        # the first query, rotated to match the slots, and the attention that queries gave
        self.placed: AttentionInput | None = None
        self.query_positions: Tensor
        self.attention: Tensor

    def attend(self, x: AttentionInput) -> Tensor:
        # a copy: the lengths grow in place before the policy reads the positions
        placed, query_positions = self.layer._place(x, self.layer.lengths[:, None].clone(), self.shift)
        if x.biases is not None:
            self.placed, self.query_positions = placed, query_positions
            return self._attend_by_distance(x)
        reach = self.layer.reaches(query_positions)
        if self.placed is not None:
            # the token is already in the slots, but not yet counted in the lengths
            out, attention = self.slots.decode_again(placed.query, x.key, x.value, self.at, reach, x.spec, x.sinks)
            self.attention = self.attention + attention * self.part
            return out
        if x.chosen is not None:
            out, attention = self._attend_to_chosen(x)
        else:
            out, attention = self.slots.decode(placed.query, x.stored_key, x.value, self.at, reach, x.spec, x.sinks)
        self.attention = attention if self.part == 1 else attention * self.part
        self.placed, self.query_positions = placed, query_positions
        return out

    def _attend_to_chosen(self, x: AttentionInput) -> tuple[Tensor, Tensor]:
        """Stores the token, and attends to what was chosen: the output, and the attention that each slot received."""
        slots, chosen = self.slots, x.chosen
        assert chosen is not None
        slots.put(x.stored_key, x.value, self.at)
        (keys, values), positions = slots.contents(), slots.positions
        out, lse = sparse_attention(x.query, keys, values, positions, chosen, x.spec)
        if x.sinks is not None:
            out, lse = merge_states(*with_sinks([out], [lse], x.sinks))
        return out, sparse_column_sums(x.query, keys, positions, chosen, lse, x.spec)

    def _attend_by_distance(self, x: AttentionInput) -> Tensor:
        """Attention with biases to the slots and the token itself, which then takes its slot."""
        slots, layer = self.slots, self.layer
        assert x.biases is not None
        columns, own = self._columns_held(self.query_positions)
        keys, values = slots.contents()
        at = layer.padding.columns(self.at[:, None])
        parts = [(keys, values, columns), (x.key, x.value, at[:, None])]
        answers = [attend_by_distance(x.query, *part, own, x.spec, x.biases) for part in parts]
        outs, lses = [out for out, _ in answers], [lse for _, lse in answers]
        if x.sinks is not None:
            outs, lses = with_sinks(outs, lses, x.sinks)
        out, lse = merge_states(outs, lses)
        of_slots, of_token = (sums_by_distance(x.query, part[0], part[2], own, lse, x.spec, x.biases) for part in parts)
        self.attention = of_slots.scatter(2, slots.spare[..., None], of_token)
        slots.put(x.key, x.value, self.at)
        return out

    def commit(self) -> None:
        visible = self.input.visible
        self.layer.lengths.add_(self.input.real_tokens)
        # a query that is padding gives no attention
        self._score(self.attention if visible is None else self.attention * visible[..., None])
        self._evict()

    def _score(self, attention: Tensor) -> None:
        layer, slots, x = self.layer, self.slots, self.placed
        assert x is not None
        static = layer.policy.static
        positions, scores, spare = slots.positions, slots.scores, slots.spare[..., None]
        if static:
            positions, scores = positions.gather(2, spare), scores.gather(2, spare)
        candidates = Candidates(
            positions,
            scores,
            None if layer.policy.observes == 0 else attention,
            x.query,
            self.query_positions,
            x.visible,
            layer.lengths,
            lambda: [(x.key, x.value) if static else slots.contents()],
            x.spec.scale,
            layer.state,
            layer.rope,
            mean_over_ranks=layer._mean_over_ranks,
            is_ragged=layer.is_ragged,
        )
        scored = _scores(layer, candidates)
        if static:
            slots.scores.scatter_(2, spare, scored)
        else:
            slots.scores.copy_(scored)

    def _evict(self) -> None:
        layer, slots = self.layer, self.slots
        scores, sinks = slots.scores, layer.policy.sinks
        if layer.pins is not None:
            scores = scores.masked_fill(layer.pins.holds(slots.positions), torch.inf)
        if layer.window is not None:
            # what has left the window goes first, sinks too
            scores = scores.masked_fill(slots.positions < sinks, torch.inf)
            hidden = layer.out_of_sight(slots.positions, layer.lengths[:, None, None])
            scores, sinks = scores.masked_fill(hidden, -torch.inf), 0
        limits, recents = layer.limits_by_head(), layer.recents
        if isinstance(layer.budget, float) and isinstance(slots, RaggedSlots) and torch.compiler.is_compiling():
            # the budget grows, and a compiled step cannot give a head more room
            limits = limits.minimum(slots.capacities - 1)
            recents = recents.view(len(limits), -1).minimum(limits - layer.policy.sinks - layer.pinned)
        if recents.dim() == 1:
            victims = choose_victim(scores, slots.positions, layer.lengths - recents, sinks)
        else:
            # heads whose newest tokens differ in number are so many sequences of one head
            scores, positions = (x.flatten(0, 1)[:, None] for x in (scores, slots.positions))
            victims = choose_victim(scores, positions, (layer.lengths[:, None] - recents).flatten(), sinks)
        slots.free(victims.view_as(slots.spare), slots.kept() > limits)


class FusedDecodeStep(EvictingStep):
    """One token, in one op: attention, scores and eviction (kernels/decode_evict.py)."""

    def attend(self, x: AttentionInput) -> Tensor:
        layer = self.layer
        return self.slots.decode_and_evict(
            x.query,
            x.key,
            x.value,
            layer.lengths if x.visible is None else torch.where(x.visible[:, 0], layer.lengths, EMPTY),
            layer.limits,
            layer.recents,
            x.spec,
            sinks=layer.policy.sinks,
            memory=layer.policy.decay,
            sink_logits=x.sinks,
        )

    def commit(self) -> None:
        self.layer.lengths.add_(self.input.real_tokens)


class ChunkStep(EvictingStep):
    """Several tokens: they see the slots and, causally, one another; then slots and tokens compete.

    places: the tokens' positions in their sequences, [batch, tokens] int32; arbitrary for padding.
    attention: what slots and tokens received, [batch, kv_heads, slots + tokens] float32; None if the policy does not
        observe it.
    """

    def __init__(self, layer: "EvictingLayer", x: AttentionInput) -> None:
        self.is_first = layer.slots is None
        layer._allocate(x)
        super().__init__(layer, x)
        if x.visible is None:
            places = torch.arange(x.tokens, dtype=torch.int32, device=x.key.device)[None]
        else:
            places = x.visible.cumsum(-1, dtype=torch.int32) - 1
        self.places = layer.lengths[:, None] + places
        self.spans = Spans.of(x)
        self.placed: AttentionInput | None = None
        self.query_positions: Tensor
        self.attention: Tensor | None = None

    def attend(self, x: AttentionInput) -> Tensor:
        placed, query_positions = self.layer._place(x, self.places[:, -x.queries :], self.shift)
        answers = [self.layer.attend_causally(placed, self.places), *attend_ahead(placed, self.spans)]
        if not self.is_first:
            answers.append(self._attend_slots(placed, query_positions))
        outs, lses = [out for out, _ in answers], [lse for _, lse in answers]
        if x.sinks is not None:
            outs, lses = with_sinks(outs, lses, x.sinks)
        out, lse = merge_states(outs, lses) if len(outs) > 1 else (outs[0], lses[0])
        is_again = self.placed is not None
        if not is_again:
            self.placed, self.query_positions = placed, query_positions
        received = self._observe(placed, lse)
        if received is not None and self.part < 1:
            received *= self.part
            received = self.attention.add_(received) if is_again and self.attention is not None else received
        self.attention = received
        return out

    def _attend_slots(self, x: AttentionInput, query_positions: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slots
        if x.chosen is not None:
            return sparse_attention(x.query, *slots.contents(), slots.positions, x.chosen, x.spec)
        if x.biases is not None:
            held = self._columns_held(query_positions)
            return attend_by_distance(x.query, *slots.contents(), *held, x.spec, x.biases)
        return slots.attend(x.query, self.layer.reaches(query_positions), x.spec)

    def commit(self, attention: Tensor | None = None) -> None:
        """Ends the forward.

        Args:
            attention: what the policy is to score by, if not the step's own.
        """
        ranking = self.rank(self.attention if attention is None else attention)
        if self.layer.competes:
            (own,) = shares_of([self.layer], [ranking])
            self.layer.take_shares(own, self.input.real_tokens)
        self.keep(ranking)

    def keep(self, ranking: "Ranking") -> None:
        """Ends the forward by what candidates are worth: as many stay as each head may keep."""
        layer, x, held = self.layer, self.input, (ranking.places, ranking.scores, self._kept(ranking))
        if isinstance(self.slots, RaggedSlots):
            layer.refill(self.slots, x.stored_key, x.value, *held)
        else:
            self.slots.replace(x.stored_key, x.value, *held)
        layer._mark_static()

    def _observe(self, x: AttentionInput, lse: Tensor) -> Tensor | None:
        """Attention received from the queries that the policy observes; lse: of the queries, over all they see."""
        last = self.layer.policy.observes
        if last == 0:
            return None
        first = 0
        if x.visible is None:
            first = 0 if last is None else max(0, x.queries - last)
        else:
            # each sequence's last real queries; earlier ones, and padding, are left out
            from_end = x.visible.flip(-1).cumsum(-1).flip(-1)
            observed = x.visible if last is None else x.visible & (from_end <= last)
            observed = observed[:, -x.queries :]
            lse = lse.masked_fill(~observed[:, None], torch.inf)
            if last is not None:
                first = int(observed.any(0).to(torch.uint8).argmax())
        every, query, lse = lse, x.query[:, :, first:], lse[:, :, first:]
        biases = None if x.biases is None else x.biases[:, :, first:]
        if x.chosen is not None:
            assert x.places is not None
            chosen = x.chosen[..., first:, :]
            within = sparse_column_sums(query, x.key, x.places, chosen, lse, x.spec)
        elif biases is not None:
            places = self.places if x.visible is None else self.places.masked_fill(~x.visible, EMPTY)
            columns = self.layer.padding.columns(places)
            own = columns[:, x.tokens - query.shape[2] :]
            within = sums_by_distance(query, x.key, columns[:, None], own, lse, x.spec, biases)
        elif self.layer.is_chunked:
            assert self.layer.window is not None
            within = sums_in_chunks(query, x.key, lse, x.spec, x.visible, self.places, self.layer.window)
        else:
            within = causal_column_sums(query, x.key, lse, x.spec, x.visible)
        if self.spans is not None:
            every = every.index_fill(2, torch.arange(first, device=every.device), torch.inf)
            within = within + self.spans.column_sums(x, every)
        if self.is_first:
            past = torch.zeros_like(self.slots.scores)
        elif x.chosen is not None:
            slots = self.slots
            past = sparse_column_sums(query, slots.contents()[0], slots.positions, chosen, lse, x.spec)
        elif biases is not None:
            held = self._columns_held(self.query_positions[:, first:])
            past = sums_by_distance(query, self.slots.contents()[0], *held, lse, x.spec, biases)
        else:
            reach = self.layer.reaches(self.query_positions[:, first:])
            past = self.slots.column_sums(query, reach, lse, x.spec)
        return torch.cat([past, within], -1)

    def rank(self, attention: Tensor | None) -> "Ranking":
        """Counts the tokens, and scores all candidates."""
        layer, slots, x = self.layer, self.slots, self.placed
        assert x is not None
        places = self.places if x.visible is None else self.places.masked_fill(~x.visible, EMPTY)
        places = places[:, None].expand(-1, x.key.shape[1], -1)
        layer.lengths.add_(x.real_tokens)
        layer.follow_lengths(x.real_tokens)
        positions = torch.cat([slots.positions, places], -1)
        scores = torch.cat([slots.scores, torch.zeros_like(places, dtype=torch.float32)], -1)
        # scores that never change are kept from the unpacked tokens, not computed again from packed ones
        first = slots.slots if layer.policy.static else 0
        candidates = Candidates(
            positions[..., first:],
            scores[..., first:],
            None if attention is None else attention[..., first:],
            x.query,
            self.query_positions,
            x.visible,
            layer.lengths,
            lambda: [(x.key, x.value)] if first else [slots.contents(), (x.key, x.value)],
            x.spec.scale,
            layer.state,
            layer.rope,
            x.tokens,
            layer._mean_over_ranks,
            layer.is_ragged,
        )
        scored = _scores(layer, candidates)
        if layer.keeps_answers:
            scored = torch.where(self._at_rest()[:, None, None], scores[..., first:], scored)
        scores = torch.cat([scores[..., :first], scored], -1)
        return Ranking(places, positions, scores, self._worth(scores, positions))

    def _at_rest(self) -> Tensor:
        """Which rows are fed one token or none, and go on as they would alone, [batch] bool."""
        fed = self.input.real_tokens
        return (torch.full_like(self.layer.lengths, fed) if isinstance(fed, int) else fed) < 2

    def _worth(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores to rank by, [batch, kv_heads, candidates]: inf for what always stays, -inf for what goes."""
        layer = self.layer
        lengths, recents = layer.lengths[:, None, None], layer.recents.view(len(positions), -1, 1)
        protected = (positions < layer.policy.sinks) | (positions >= lengths - recents)
        if layer.pins is not None:
            protected = protected | layer.pins.holds(positions)
        gone = positions == EMPTY
        if layer.window is not None:
            gone = gone | layer.out_of_sight(positions, lengths)
        return ranked(scores).masked_fill(protected, torch.inf).masked_fill(gone, -torch.inf)

    def _kept(self, ranking: "Ranking") -> Tensor:
        """Which candidates stay, [batch, kv_heads, candidates] bool: per head, as many as it may keep."""
        worth, limits, policy = ranking.worth, self.layer.limits_by_head(), self.layer.policy
        # of equal scores the later token stays, independent of padding and slots
        if self.is_first:
            # nothing was held before: the candidates are in text order
            backwards = torch.arange(worth.shape[-1] - 1, -1, -1, device=worth.device).expand_as(worth)
        else:
            backwards = ranking.positions.argsort(dim=-1, descending=True, stable=True)
        if has_second_stage(policy):
            first = _best(worth, backwards, limits - (policy.second_stage * limits).int())
            scores = ranking.scores.masked_fill(ranking.positions == EMPTY, 0.0)
            second = ranked(second_scores(scores, self._output_norms())).masked_fill(first, torch.inf)
            # a row fed one token goes by its scores, as in a step
            by_second = worth.isfinite() & ~self._at_rest()[:, None, None]
            worth = torch.where(by_second, second, worth)
        chosen = _best(worth, backwards, limits)
        if self.layer.keeps_answers:
            chosen = chosen | self._at_rest()[:, None, None]
        return chosen & (worth > -torch.inf)

    def _output_norms(self) -> Tensor:
        """How much the value of each candidate can change the layer's output, [batch, kv_heads, candidates]."""
        projection = self.layer.output_projection
        assert projection is not None
        values = [self.slots.contents()[1], self.input.value]
        weight = projection(self.input.value)
        return torch.cat([output_norms(value, weight) for value in values], -1)


@dataclass(frozen=True)
class Ranking:
    """What the candidates of a chunk are worth: a cache's slots, then the chunk's tokens.

    places: of the chunk's tokens, [batch, kv_heads, tokens] int32, EMPTY for padding. positions: of all candidates,
    [batch, kv_heads, candidates] int32. scores: the policy's. worth: the same with inf for what always stays, -inf for
    what goes.
    """

    places: Tensor
    positions: Tensor
    scores: Tensor
    worth: Tensor


def shares_of(layers: "Sequence[EvictingLayer]", rankings: Sequence[Ranking]) -> list[Tensor]:
    """How many tokens the heads of each of these layers, which compete with one another, may keep."""
    first, ranks = layers[0], layers[0].ranks
    worth = [ranking.worth for ranking in rankings]
    if ranks is not None:
        worth = [ranks.all_heads(each, -torch.inf) for each in worth]
    heads = sum(each.shape[1] for each in worth)
    nominal = first.nominal_limits().long()
    floor = (first.policy.sinks + first.pinned + first.recents + first.policy.chooses).long().minimum(nominal)
    counts = shares(worth, nominal * heads, floor)
    return counts if ranks is None else [ranks.own_heads(each, 1) for each in counts]


def _best(worth: Tensor, backwards: Tensor, counts: Tensor) -> Tensor:
    """The best candidates, [batch, kv_heads, candidates] bool: of each head so many, [batch, 1 or kv_heads]; of equal
    ones those that come first in `backwards`."""
    order = backwards.gather(-1, worth.gather(-1, backwards).argsort(dim=-1, descending=True, stable=True))
    chosen = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))


def _scores(layer: "EvictingLayer", candidates: Candidates) -> Tensor:
    """What the policy makes of the candidates, float32 and finite or NaN; ValueError: it is no score for each."""
    scores, wanted = layer.policy.score(candidates), candidates.positions
    if (
        not isinstance(scores, Tensor)
        or scores.shape != wanted.shape
        or scores.device != wanted.device
        or scores.is_complex()
    ):
        found: object = scores
        if isinstance(found, Tensor):
            found = f"{list(found.shape)}, {str(found.dtype).removeprefix('torch.')} on {found.device}"
        raise ValueError(
            f"{type(layer.policy).__name__}.score must return a score per candidate, real numbers on {wanted.device}, "
            f"[batch, kv_heads, candidates] = {list(wanted.shape)}, got {found}"
        )
    # infinities stand for what always stays, and for places without a token; our own policies return none
    return scores.float() if layer.scores_are_finite else scores.float().clamp(-_MOST, _MOST)
