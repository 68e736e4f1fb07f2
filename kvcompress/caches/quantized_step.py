"""A forward through a layer of GEARCache, eager or compiled."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.caches.spans import Spans, attend_ahead
from kvcompress.kernels.merge import joint_output
from kvcompress.layer import AttentionInput, ForwardStep
from kvcompress.storage.columns import marked_first
from kvcompress.storage.padding import reordered
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.tail import TailSegment

if TYPE_CHECKING:
    from kvcompress.caches.quantized_layer import QuantizedLayer


class QuantizedStep(ForwardStep):
    """A forward: its tokens are attended to as they came, and encoded when it ends.

    A single token is stored at once where that changes nothing: among a row's first tokens, or in a tail that packs
    none. real: tokens of each row that are not padding. query_positions: [batch, queries] int32. joins: of a single
    token, which rows' tail it comes to. waits: whether it is not stored there yet.
    """

    joins: list[int]
    waits = False

    def __init__(self, layer: "QuantizedLayer", x: AttentionInput) -> None:
        super().__init__(x)
        self.layer = layer
        self.tail = layer._tail_for(x.key, x.value)
        self.real = layer._real(x)
        self.places = layer._query_positions(x)
        self.query_positions = layer.reaches(self.places[:, -x.queries :])
        self.spans = Spans.of(x)
        if x.tokens > 1:
            return
        lengths, lacking = layer.lengths, layer.lacking()
        apart = [min(fresh, lacks) for fresh, lacks in zip(self.real, lacking, strict=True)]
        self.joins = [fresh - early for fresh, early in zip(self.real, apart, strict=True)]
        if layer.first is not None:
            layer.first.put(x.key, x.value, apart, lengths)
        if self.tail.is_exact:
            self.tail.put(x.key, x.value, self.joins, lengths)
        self.waits = not self.tail.is_exact and any(self.joins)

    def attend(self, x: AttentionInput) -> Tensor:
        answers = self.layer._past(x, self.query_positions, self.joins if self.waits else None)
        if x.tokens > 1:
            answers += [self.layer.attend_causally(x, self.places), *attend_ahead(x, self.spans)]
        return joint_output(answers, x.sinks)

    def commit(self) -> None:
        layer, x, real = self.layer, self.input, self.real
        if self.waits:
            self.tail.put(x.key, x.value, self.joins, layer.lengths)
        layer.lengths = [length + fresh for length, fresh in zip(layer.lengths, real, strict=True)]
        if x.tokens == 1:
            layer._pack_tail(real)
        else:
            layer._pack(*behind_the_tail(self.tail, x, real), real, x.tokens)


def behind_the_tail(tail: TailSegment, chunk: AttentionInput, real: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The tail's tokens and the chunk's, [batch, kv_heads, any, head_dim], and where each row's real ones begin."""
    used = max(tail.held)
    key, value = chunk.key, chunk.value
    if used:
        key, value = (torch.cat(sides, 2) for sides in zip(tail.contents(used), (key, value), strict=True))
    if all(fresh == chunk.tokens for fresh in real) and all(held == used for held in tail.held):
        return key, value, [0] * len(real)
    is_real = torch.ones(chunk.key.shape[0], chunk.tokens, dtype=torch.bool, device=key.device)
    if chunk.visible is not None:
        is_real = chunk.visible
    is_real = torch.cat([tail.positions[:, :used] != EMPTY, is_real], 1)
    begins = is_real.to(torch.uint8).argmax(-1)
    reach = is_real.shape[1] - is_real.flip(-1).to(torch.uint8).argmax(-1) - begins
    count = is_real.sum(-1)
    if bool(((reach == count) | (count == 0)).all()):
        # avoids a copy of a padded prompt
        return key, value, begins.tolist()
    order = marked_first(is_real)
    return reordered(key, order), reordered(value, order), [0] * len(real)
