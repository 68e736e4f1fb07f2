"""Reading twice: for policies such as KVzip, a model is fed again what it has just been fed.

All tokens of a forward stay until the model has read them again, after themselves, a chunk at a time, through a cache
that stores nothing. Each layer records the most attention that each token receives; then the policy chooses.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.evicting_step import ChunkStep, shares_of
from kvcompress.caches.matching import Asked
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states, with_sinks
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep, as_stored
from kvcompress.policies.policy import SecondReading
from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.slots import SlotSegment

_UNSCALED = LogitSpec(1.0)


@dataclass
class Waiting:
    """What is chosen from when a text has been read again: the tokens of a forward, and those in slots.

    segment: the forward's, whose scores are what the second reading records of the attention that each receives; None
    where only what is in slots is chosen from. past: the same for the slots. lengths: of the sequences, with these.
    twice: which sequences are read again, [batch] bool. step: the forward's. asked: queries of each chunk, where what
    is kept is fitted to them. spec: how these make logits.
    """

    segment: SlotSegment | None
    past: Tensor
    lengths: Tensor
    twice: Tensor
    step: ChunkStep
    asked: list[Asked] = field(default_factory=list)
    spec: LogitSpec = _UNSCALED


class RereadLayer(EvictingLayer):
    """An evicting layer that keeps the tokens of a forward until they have been read again."""

    waiting: Waiting | None = None

    def segments(self) -> list[Segment]:
        waiting = self.waiting
        return super().segments() + ([] if waiting is None or waiting.segment is None else [waiting.segment])

    def reset(self) -> None:
        super().reset()
        self.waiting = None

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._check_ended()
        return super().dump()

    def _check_ended(self) -> None:
        if self.waiting is not None:
            raise RuntimeError(
                "tokens wait to be read again: the forward that fed them was compiled, ran without the model's hooks, "
                "or was interrupted; call cache.reset()"
            )

    def _begin(self, x: AttentionInput) -> ForwardStep:
        self._check_ended()
        return super()._begin(x)

    def _end(self, step: ForwardStep) -> None:
        if not isinstance(step, ChunkStep):
            step.commit()
            return
        x, places = step.input, step.places
        batch, kv_heads, tokens = x.key.shape[:3]
        if x.visible is None:
            fresh = torch.full((batch,), tokens, device=places.device)
        else:
            fresh, places = x.visible.sum(-1), places.masked_fill(~x.visible, EMPTY)
        segment = SlotSegment.load(
            {
                "keys": x.key,
                "values": x.value,
                "positions": places.expand(batch, -1)[:, None].expand(-1, kv_heads, -1),
                "scores": torch.zeros(batch, kv_heads, tokens, device=places.device),
            }
        )
        # until then they are held once, and of the queries what the policy looks at
        last = self.policy.queries_needed
        asked = x.queries if last is None else min(max(1, last), x.queries)
        query = x.query[:, :, -asked:].clone()
        step.input = step.placed = dataclasses.replace(x, query=query, key=segment.keys, value=segment.values)
        step.query_positions = step.query_positions[:, -asked:]
        lengths = (self.lengths + fresh).to(torch.int32)
        self.waiting = Waiting(segment, torch.zeros_like(step.slots.scores), lengths, fresh > 1, step)

    def observe(self, chunk: AttentionInput) -> Tensor:
        """The attention of tokens of the second reading, [batch, heads, queries, head_dim]; records what they attend
        to."""
        waiting = self.waiting
        how = self.policy.rereads
        assert self.slots is not None
        assert waiting is not None
        assert how is not None
        batch, tokens = chunk.key.shape[0], chunk.tokens
        visible = chunk.visible
        if visible is None:
            visible = torch.ones(batch, tokens, dtype=torch.bool, device=chunk.key.device)
        places = waiting.lengths[:, None] + visible.cumsum(-1, dtype=torch.int32) - 1  # [batch, tokens]
        out, lse = self.attend_causally(chunk, places)
        outs, lses = [out], [lse]
        places = self.reaches(places)
        fresh = waiting.segment
        read = [] if fresh is None else [(fresh, fresh.scores)]
        if fresh is None or self.get_seq_length() > fresh.slots:
            read.append((self.slots, waiting.past))
        for segment, _ in read:
            out, lse = segment.attend(chunk.query, places, chunk.spec)
            outs, lses = [*outs, out], [*lses, lse]
        of_text = lses[1] if len(lses) == 2 else torch.logaddexp(*lses[1:])
        if chunk.sinks is not None:
            outs, lses = with_sinks(outs, lses, chunk.sinks)
        out, lse = merge_states(outs, lses)
        lse = of_text if how.records == "squares" else lse
        lse = lse.masked_fill(~visible[:, None], torch.inf)
        for segment, received in read:
            if how.records == "squares":
                received += segment.column_squares(chunk.query, places, lse, chunk.spec)
            else:
                torch.maximum(received, segment.column_maxima(chunk.query, places, lse, chunk.spec), out=received)
        if how.fits and self.window is None:
            # of all layers that share the tokens as many together
            asked = max(1, how.fits // (1 + self.kv_consumers))
            waiting.asked.append(Asked.spread(chunk, visible, of_text, asked))
            waiting.spec = chunk.spec
        return out

    def received(self) -> tuple[ChunkStep, Tensor]:
        """Ends the wait: the forward's step, and what the policy is to score by, the second reading's attention."""
        waiting, self.waiting = self.waiting, None
        assert waiting is not None
        own, most = waiting.step.attention, waiting.past
        if waiting.segment is not None:
            most = torch.cat([most, waiting.segment.scores], -1)
        if own is None:
            return waiting.step, most
        return waiting.step, torch.where(waiting.twice[:, None, None], most, own)


class _Reading(ForwardStep):
    """A forward of the second reading through a layer, which stores nothing."""

    def __init__(self, layer: RereadLayer, x: AttentionInput) -> None:
        super().__init__(x)
        self.layer = layer

    def attend(self, x: AttentionInput) -> Tensor:
        return self.layer.observe(x)

    def commit(self) -> None:
        """Does nothing."""


class _Witness(CompressedLayer):
    """A layer's side of the second reading: it stores nothing."""

    def __init__(self, layer: RereadLayer) -> None:
        super().__init__(PaddingRecord(), layer.window)
        self.layer = layer

    def segments(self) -> list[Segment]:
        return []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.dtype = self.layer.dtype

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()

    def _begin(self, x: AttentionInput) -> ForwardStep:
        return _Reading(self.layer, x)


class ReconstructionCache(CompressedCache):
    """The cache through which a model reads the second time."""

    layers: list[_Witness]  # type: ignore[assignment]
    reads_again = True
    serves_chunks = True

    def __init__(self, model: PreTrainedModel, layers: Sequence[RereadLayer]) -> None:
        self._read = layers
        super().__init__(model)

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        return _Witness(self._read[self.attending.index(index)])


@torch.no_grad()
def read_again(
    model: PreTrainedModel,
    layers: Sequence[RereadLayer],
    ids: Tensor,
    padding: PaddingRecord,
    seen: int,
    how: SecondReading,
    states: Mapping[int, hf.States] = MappingProxyType({}),
) -> None:
    """Feeds a model the tokens of its last forward again, after themselves: then the layers can `choose`.

    Args:
        model: a module that takes input_ids and a cache; it needs no head.
        ids: [batch, tokens], of that forward.
        padding: which of the tokens seen are padding, and where the model has placed the last one.
        seen: how many tokens were seen, with these.
        how: the prompt and the chunks to read; each chunk is read at the same positions.
        states: those of layers that keep states, after that forward, by layer; each chunk is read from there.
    """
    batch, tokens = ids.shape
    visible = padding.visible
    fresh = ids.new_ones(batch, tokens, dtype=torch.bool) if visible is None else visible[:, -tokens:]
    # after the last token, wherever the model has placed it
    if padding.last_position is not None:
        lengths = ids.new_tensor(padding.last_position) + 1
    else:
        lengths = ids.new_full((batch,), seen) if visible is None else visible.sum(-1)
    rows = [row[shown].tolist() for row, shown in zip(ids, fresh, strict=True)]
    # a single token is not read again
    read_rows(model, layers, [row if len(row) > 1 else [] for row in rows], lengths, how, states)


@torch.no_grad()
def read_rows(
    model: PreTrainedModel,
    layers: Sequence[RereadLayer],
    rows: list[list[int]],
    lengths: Tensor,
    how: SecondReading,
    states: Mapping[int, hf.States] = MappingProxyType({}),
) -> None:
    """Feeds a model texts through a cache that stores nothing, a chunk at a time, after what the layers hold.

    Args:
        model, how, states: as in `read_again`.
        rows: the tokens of each sequence, without padding.
        lengths: the position at which each sequence goes on, and each of its chunks begins, [batch] int64.
    """
    sizes = hf.sizes(hf.decoder_config(model))
    reading = ReconstructionCache(model, layers)
    for start in range(0, max(map(len, rows)), how.chunk):
        reading.take_states(copy.deepcopy(dict(states)))
        parts = [[*how.prompt, *row[start : start + how.chunk]] if row[start:] else [] for row in rows]
        width = max(map(len, parts))
        if sizes.learned_positions and sizes.longest is not None:
            # a table of positions has an end: there the text is placed so that it still fits
            lengths = lengths.clamp(max=max(0, sizes.longest - width))
        again = lengths.new_tensor([[0] * (width - len(part)) + part for part in parts])
        mask = lengths.new_tensor([[0] * (width - len(part)) + [1] * len(part) for part in parts])
        places = lengths[:, None] + (mask.cumsum(-1) - 1).clamp(min=0)
        model(
            input_ids=again,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=places,
            use_cache=True,
            **hf.cache_argument(model, reading),
        )


@torch.no_grad()
@as_stored()
def choose(layers: Sequence[RereadLayer], all_compete: bool) -> None:
    """Lets the policy choose in each layer, or in all at once, by what the second reading attended to.

    Args:
        all_compete: the heads of all layers compete for one budget, instead of each layer choosing alone.
    """
    layers[0].forwards_begun += 1
    ended = [layer.received() for layer in layers]
    if all_compete:
        rankings = [step.rank(attention) for step, attention in ended]
        counts = shares_of(layers, rankings)
        for layer, (step, _), ranking, count in zip(layers, ended, rankings, counts, strict=True):
            layer.take_shares(count, step.input.real_tokens)
            step.keep(ranking)
    else:
        for step, attention in ended:
            step.commit(attention)
    # where an error of memory comes in between, layers disagree, and the cache says so
    layers[0].forwards_begun -= 1
