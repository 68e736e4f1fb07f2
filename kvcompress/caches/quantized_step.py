"""A forward through a layer of GEARCache, eager or compiled."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.merge import joint_output
from kvcompress.layer import AttentionInput, ForwardStep
from kvcompress.storage.columns import marked_first
from kvcompress.storage.padding import reordered
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.tail import TailSegment

if TYPE_CHECKING:
    from kvcompress.caches.quantized_layer import QuantizedLayer


class QuantizedStep(ForwardStep):
    """A forward: its tokens are attended to unpacked, and encoded when it ends; a single token joins the tail at once.

    real: tokens of each row that are not padding. query_positions: [batch, queries] int32.
    """

    def __init__(self, layer: "QuantizedLayer", x: AttentionInput) -> None:
        super().__init__(x)
        self.layer = layer
        self.tail = layer._tail_for(x.key, x.value)
        self.real = layer._real(x)
        self.query_positions = layer._query_positions(x)[:, -x.queries :]
        if x.tokens == 1:
            self.tail.put(x.key, x.value, self.real, layer.lengths)

    def attend(self, x: AttentionInput) -> Tensor:
        answers = self.layer._past(x, self.query_positions)
        if x.tokens > 1:
            answers.append(causal_attention(x.query, x.key, x.value, x.spec, x.visible))
        return joint_output(answers, x.sinks)

    def commit(self) -> None:
        layer, x, real = self.layer, self.input, self.real
        layer.lengths = [length + fresh for length, fresh in zip(layer.lengths, real, strict=True)]
        if x.tokens == 1:
            layer._pack(self.tail.keys, self.tail.values, [0] * len(real), real, 1)
        else:
            layer._pack(*behind_the_tail(self.tail, x, real), real, x.tokens)


def behind_the_tail(tail: TailSegment, chunk: AttentionInput, real: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """The tail's tokens and the chunk's, [batch, kv_heads, any, head_dim], and where each row's real ones begin."""
    used = max(tail.held)
    key, value = chunk.key, chunk.value
    if used:
        key = torch.cat([tail.keys[:, :, :used], key], 2)
        value = torch.cat([tail.values[:, :, :used], value], 2)
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
