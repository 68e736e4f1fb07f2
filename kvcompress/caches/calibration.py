"""Measures a basis: the principal components of the keys and values that a model makes of some texts."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.caches.basis import Basis, Directions, LayerBasis, check_whole
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.profiling import rows_of_all
from kvcompress.storage.rope import NOT_FINITE, Rope

# the first tokens of a text, whose keys and values are outliers among all others, and are never packed
SINKS = 4
# tokens for each number of a token's keys: fewer may be worse than no basis, and more gain little
_FEW, _MANY = 4, 10


def measure_basis(model: PreTrainedModel, texts: Sequence[Tensor], *, source: str = "") -> Basis:
    """Measures in which directions keys, before RoPE, and values of a model vary.

        basis = measure_basis(model, [tokenizer(text, return_tensors="pt").input_ids])
        basis.save("basis.safetensors")

    Each text is fed once. Some ten times as many tokens as a layer has numbers for a token's keys (kv_heads * head_dim)
    will do; take texts of all kinds that are to come. One layer's sums take 16 * (kv_heads * head_dim)^2 bytes on the
    CPU.

    Args:
        model: the model; as with any cache, it attends through kvcompress from then on.
        texts: token ids, each [tokens] or [batch, tokens], int64 or int32, without padding.
        source: what the texts are, to be shown with the basis.

    Raises:
        TypeError: texts are no tensors of token ids.
        ValueError: there are fewer tokens than numbers of a token's keys; some of their keys or values are not finite;
            the model changes its RoPE with the length, applies it in its own way, or is shared by processes.
    """
    check_whole(model)
    rows = rows_of_all(texts)
    tokens, digest = sum(text.shape[0] * max(0, text.shape[1] - SINKS) for text in rows), hashlib.sha256()
    decoder = hf.decoder_of(model)
    width = max(own.key_width for own in hf.layer_heads(hf.text_config(model)))
    if tokens < width:
        raise ValueError(
            f"a basis of {type(model).__name__} takes texts of at least {width} tokens in all, without "
            f"the first {SINKS} of each: as many as a layer has numbers for a token's keys; got {tokens}"
        )
    if tokens < _FEW * width:
        warnings.warn(
            f"a basis of {tokens} tokens: directions of {width} numbers are known well from about {_MANY * width} "
            "tokens on; with few it may lose more than no basis",
            stacklevel=2,
        )
    cache = _SummingCache(model)
    for number, text in enumerate(rows):
        digest.update(text.shape[1].to_bytes(8, "little") + text.long().cpu().numpy().tobytes())
        cache.reset()
        with torch.no_grad():
            decoder(input_ids=text.to(hf.input_device(model)), use_cache=True, **hf.cache_argument(decoder, cache))
        for index, sums in enumerate(cache.sums):
            sums.check(f"layer {index} of {type(model).__name__}", f"texts[{number}]")
    measured = {
        "texts": sum(len(text) for text in rows),
        "tokens": tokens,
        "sha256": digest.hexdigest()[:16],
        **({"source": source} if source else {}),
    }
    return Basis(tuple(sums.basis() for sums in cache.sums), hf.Fingerprint.of(model), measured)


class _Sums:
    """Sums over the tokens of one layer."""

    def __init__(self, rope: Rope | None) -> None:
        self.rope = rope
        self.count = 0
        self.sums: list[list[Tensor]] = []

    def add(self, key: Tensor, value: Tensor) -> None:
        """key, value: a text's, from its first token on, [batch, kv_heads, tokens, head_dim]."""
        if self.rope is not None:
            key = self.rope.unrotate(key.float(), torch.arange(key.shape[2], device=key.device))
        self.count += key.shape[0] * max(0, key.shape[2] - SINKS)
        found = []
        for x in (key, value):
            # [tokens, kv_heads * head_dim]
            flat = x[:, :, SINKS:].double().transpose(1, 2).flatten(0, 1).flatten(1)
            found.append([flat.sum(0).cpu(), (flat.mT @ flat).cpu()])
        if not self.sums:
            self.sums = found
            return
        for sums, more in zip(self.sums, found, strict=True):
            for held, fresh in zip(sums, more, strict=True):
                held += fresh

    def check(self, layer: str, text: str) -> None:
        """Raises ValueError if this text, the last one, has made keys or values of this layer that are not finite."""
        for side, (_, squares) in zip(LayerBasis._fields, self.sums, strict=True):
            if not bool(squares.isfinite().all()):
                raise ValueError(f"{layer} makes {side} of {text} that are not finite: {NOT_FINITE}")

    def basis(self) -> LayerBasis:
        keys, values = (Directions.of(self.count, *sums) for sums in self.sums)
        return LayerBasis(keys, values)


class _SummingCache(DenseCache):
    """Sums up what it is fed; each text from its beginning, in one forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.sums = [_Sums(Rope.of(model, index)) for index in range(len(self.layers))]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.sums[layer_idx].add(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
