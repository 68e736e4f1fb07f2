"""Packs the keys of one layer in a calibrated basis, of all KV heads together (kernels/calibrated.py says how)."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kvcompress.kernels.calibrated import (
    CalibratedKeys,
    KeyDecoder,
    calibrated_codes,
    decoded_keys,
    water_filling,
)
from kvcompress.kernels.calibrated import CalibratedScheme as CalibratedScheme
from kvcompress.kernels.quantise import blocks_apart
from kvcompress.storage.rope import Rope

# the smallest deviation of a component, as a share of that of the whole key: what vectors in float16 leave of it
_LEAST = 1e-3
_TINY = 1e-12


class Directions(NamedTuple):
    """The principal components of one layer's keys, or values.

    Attributes:
        mean: [width] float32, width = kv_heads * head_dim, heads one after another.
        vectors: [width, width] float32, orthonormal columns as float16 rounds them.
        variances: [width] float32, of the components, falling.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor

    @classmethod
    def of(cls, count: int, total: Tensor, squares: Tensor) -> Self:
        """From `count` vectors: their sum [width] and the sum of their outer products [width, width], float64."""
        mean = total / count
        variances, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
        # one of two equally good signs, on every machine the same
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = (vectors * largest.sign()).flip(-1).half().float()
        return cls(mean.half().float(), vectors, variances.flip(-1).clamp(min=0.0).float())


def scheme_for(variances: Tensor, bits: float) -> CalibratedScheme:
    """How components of these falling variances are coded by so many bits a number, on average."""
    width = len(variances)
    # widths change where kernels' tiles end; of few components, more often
    step = max(8, min(32, width // 8))
    found = water_filling(variances.tolist(), bits, step)
    # keys that do not vary at all have codes too, of a token that is not finite
    return found if found.components else CalibratedScheme(0, 0, min(step, width))


class KeyCodec:
    """What packs and decodes a layer's keys. It only moves with the model, so copies share it.

    scheme: how many components have codes of 8, 4 and 2 bits.
    """

    def __init__(
        self,
        directions: Directions,
        kv_heads: int,
        rope: Rope | None,
        bits: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            directions: of the layer's keys without RoPE, of so many KV heads.
            rope: the layer's rotary embedding; None if it has none.
            bits: of a number of a key, on average, without scales.
            device: where the layer is.
            dtype: in which it attends, mostly.
        """
        self.scheme = scheme_for(directions.variances, bits)
        self.rope = rope
        self.kv_heads = kv_heads
        used = self.scheme.components
        least = max(_LEAST * float(directions.variances.sum().sqrt()), _TINY)
        self.deviations = directions.variances[:used].sqrt().clamp(min=least).to(device)
        self.vectors = directions.vectors[:, :used].half().to(device)
        self.mean = directions.mean.to(device)
        self.rotation: tuple[Any, ...] = ()
        if rope is not None:
            self.rotation = rope.inv_freq.to(device), rope.scaling, rope.interleaved
        self._decoders: dict[torch.dtype, KeyDecoder] = {}
        self.decoder(dtype, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @staticmethod
    def nbytes_for(scheme: CalibratedScheme, width: int, itemsize: int) -> int:
        """Bytes of a codec of keys of so many numbers a token, where attention is in one dtype; without frequencies."""
        return scheme.components * (4 + (2 + itemsize) * width) + 4 * width

    def tensors(self) -> list[Tensor]:
        """All that it holds, for any number of tokens."""
        frequencies = self.rotation[:1]
        return [
            self.deviations,
            self.vectors,
            self.mean,
            *frequencies,
            *(each.rows for each in self._decoders.values()),
        ]

    def _follow(self, device: torch.device) -> None:
        """Moves everything to where the layer is by now."""
        if self.mean.device != device:
            for name in ("deviations", "vectors", "mean"):
                setattr(self, name, getattr(self, name).to(device))
            self.rotation = tuple(each.to(device) if isinstance(each, Tensor) else each for each in self.rotation)
            self._decoders = {dtype: self._decoder(dtype) for dtype in self._decoders}

    def encode(self, key: Tensor, starts: Tensor) -> CalibratedKeys:
        """Packs whole blocks.

        Args:
            key: [batch, kv_heads, blocks, block, head_dim], rotated by its place.
            starts: [batch, blocks] int32, the place of each block's first token.
        """
        self._follow(key.device)
        # some blocks at a time, once even of none: there is no second copy of all of them
        runs = blocks_apart(key) or [slice(0, 0)]
        parts = [self._encode(key[:, :, some], starts[:, some]) for some in runs]
        if len(parts) == 1:
            return parts[0]
        return CalibratedKeys(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))

    def _encode(self, key: Tensor, starts: Tensor) -> CalibratedKeys:
        key = key.float()
        if self.rope is not None:
            places = starts[:, None, :, None] + torch.arange(key.shape[3], device=key.device)
            key = self.rope.unrotate(key, places)
        flat = key.permute(0, 2, 3, 1, 4).flatten(3) - self.mean
        # in float64: a token is packed as it would be alone, whatever the shape of the product
        components = (flat.double() @ self.vectors.double()).float()
        return calibrated_codes(components, self.deviations, self.scheme, starts)

    def decode(self, packed: CalibratedKeys) -> Tensor:
        """The keys that attention sees, [batch, kv_heads, blocks, block, head_dim] float32."""
        self._follow(packed.scales.device)
        decoder = self._decoders.get(torch.float32) or self._decoder(torch.float32)
        return decoded_keys(packed, decoder, self.kv_heads, torch.float32)

    def decoder(self, dtype: torch.dtype, device: torch.device) -> KeyDecoder:
        """What attention in this dtype decodes with; held from then on."""
        self._follow(device)
        if dtype not in self._decoders:
            self._decoders[dtype] = self._decoder(dtype)
        return self._decoders[dtype]

    def _decoder(self, dtype: torch.dtype) -> KeyDecoder:
        units = self.deviations * self.scheme.units(self.deviations.device) / 2
        with torch.inference_mode(False), torch.no_grad():
            rows = (self.vectors.float() * units).mT.to(dtype, memory_format=torch.contiguous_format)
        return KeyDecoder(rows, self.mean, *self.rotation)
