"""GEAR on the latents of multi-head latent attention: one half is packed as keys, one as values, joined to attend.

A latent is both key and value, so a kernel that reads keys and values apart cannot attend to it packed. A step decodes
what is held, some blocks at a time, and attends to that: what it takes beside the cache is one such piece.
"""

import dataclasses

import torch
from torch import Tensor

from kvcompress.caches.index_beside import IndexBeside, StepBeside
from kvcompress.caches.quantized_layer import QuantizedLayer, nothing_seen, pieces_of
from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.sparse_attention import sparse_attention
from kvcompress.layer import AttentionInput, ForwardStep
from kvcompress.storage.tail import numbers


class LatentStep(StepBeside):
    """A forward: its tokens are stored in parts, and attended to whole."""

    layer: "LatentQuantizedLayer"

    def __init__(self, layer: "LatentQuantizedLayer", x: AttentionInput) -> None:
        key, value = layer.parts(x.key)
        super().__init__(layer, dataclasses.replace(x, key=key, value=value))


class LatentQuantizedLayer(IndexBeside, QuantizedLayer):
    """One layer's packed latents, in parts of a width that can be packed.

    The first half of a token's numbers is held as values, the second half, with what keys share, as keys: both
    [batch, parts, tokens, width].
    """

    reserves_on_gpu = False
    # of each part
    width: int

    def parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [batch, 1, tokens, numbers] as they are stored: keys and values, [batch, parts, tokens, width]."""
        values, keys = latents[:, 0].unflatten(-1, (-1, self.width)).transpose(1, 2).chunk(2, 1)
        return keys, values

    def _joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `parts` gave, as keys [batch, 1, tokens, numbers] and values [batch, 1, tokens, rank]."""
        whole = torch.cat([values, keys], 1).transpose(1, 2).flatten(2)[:, None]
        return whole, whole[..., : self.latent_rank]

    def as_given(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `parts` gave, as models give it: latents, and what is shared of keys, [batch, 1, tokens, any]."""
        whole, latents = self._joined(keys, values)
        return latents, whole[..., latents.shape[-1] :]

    @property
    def packed_width(self) -> int:
        return self.width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if key_states.shape[-1] == self.width:
            # from what is stored
            batch, parts = key_states.shape[:2]
            self.kv_shape = (batch, 1, 2 * parts * self.width)

    def is_traceable(self, tokens: int) -> bool:
        return False

    def tokens_kept(self) -> Tensor:
        return super().tokens_kept()[:, :1]

    def fill(self, key: Tensor, value: Tensor) -> None:
        super().fill(*self.parts(torch.cat([key, value], -1)))

    def _begin(self, x: AttentionInput) -> ForwardStep:
        return LatentStep(self, x)

    def _past(
        self, chunk: AttentionInput, query_positions: Tensor, joins: list[int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        query, spec = chunk.query, chunk.spec
        answers = []
        for part in QuantizedLayer.segments(self):
            for *sides, positions in pieces_of(part):
                whole = self._joined(*sides)
                if chunk.chosen is None:
                    answers.append(self._attend_to(query, *whole, positions, query_positions, spec))
                else:
                    places = positions[:, 0].to(torch.int32)
                    answers.append(sparse_attention(query, *whole, places, chunk.chosen, spec))
        if joins is not None:
            positions = numbers(self._of_token(joins), query.device)[:, None, None]
            if chunk.chosen is not None:
                return [*answers, sparse_attention(query, chunk.key, chunk.value, positions[:, 0], chunk.chosen, spec)]
            answers.append(self._attend_to(query, chunk.key, chunk.value, positions, query_positions, spec))
        return answers or nothing_seen(chunk)

    @staticmethod
    def _attend_to(
        query: Tensor, key: Tensor, value: Tensor, positions: Tensor, query_positions: Tensor, spec: LogitSpec
    ) -> tuple[Tensor, Tensor]:
        # decoded in float32; values stay a part of the keys
        key = key.to(query.dtype)
        value = key[..., : value.shape[-1]]
        return slot_attention(query, key, value, positions.to(torch.int32), query_positions, spec)
