"""Codecs of `save(path, codec=...)`: which of a cache's tensors go through a basis, and how a file is read again.

KVTC (arXiv:2511.01815) stores a prompt's keys and values for its next use: decorrelated by a basis that was measured
once, quantised, and entropy-coded. How one tensor is coded says kvcompress/storage/transform_coding.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.caches.basis import Basis
from kvcompress.policies.settings import settled
from kvcompress.storage import frames, transform_coding
from kvcompress.storage.frames import LOSSLESS, TRANSFORM, EncodedTensor
from kvcompress.storage.rope import Rope
from kvcompress.storage.tensor_file import Decode
from kvcompress.storage.transform_coding import Coding, Places, Transform

if TYPE_CHECKING:
    from kvcompress.cache import CompressedCache

# fewer bits leave nothing to read, and more are no fewer than what there was
_BITS = (0.5, 12.0)
# bits a number that values get of those of keys, which lose less by it, and at most which share
_TO_VALUES, _MOST = 0.3, 0.15


class TransformCodec:
    """Keys and values in a few bits a number, for files: principal components, one step for all, entropy codes.

        cache.save("document.safetensors", codec=TransformCodec("basis.safetensors", bits=2.0))
        again = DenseCache.load("document.safetensors", model, basis="basis.safetensors")

    For caches that keep tokens as they are: DenseCache, HydragenCache, and AcrossKVCache and SwiftKVCache over them. It
    is lossy, and a DenseCache that is loaded, continued and saved loses a second time; a HydragenCache's prefixes do
    not. The first 4 tokens of each row stay in 16 bits, and everything but keys and values is exact. A token with keys
    or values that are not finite comes back as NaN.
    """

    def __init__(self, basis: Basis | str | os.PathLike[str], bits: float = 2.0) -> None:
        """
        Args:
            basis: of the model whose cache is saved, or the path of its file: `measure_basis` makes one. The cache's
                file names it; to load that, another process needs it again.
            bits: of the file for each number of keys and values of tokens, everything counted, 0.5 to 12. A text of few
                hundred tokens may take more.

        Raises:
            TypeError: basis is neither a Basis nor a path, or bits no number.
            ValueError: bits is out of range, or the file is no basis.
        """
        bits = settled(bits, float)
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            raise TypeError(f"bits must be a number from {_BITS[0]} to {_BITS[1]:g}, got {bits!r}")
        if not _BITS[0] <= bits <= _BITS[1]:
            raise ValueError(f"bits must be from {_BITS[0]} to {_BITS[1]:g} a number, got {bits}")
        self.basis = Basis.opened(basis)
        self.bits = float(bits)

    def bits_of(self, side: str) -> float:
        """Bits a number of keys, or of values, of which there are as many."""
        more = min(_TO_VALUES, _MOST * self.bits)
        return self.bits + more if side == "values" else self.bits - more

    def __repr__(self) -> str:
        return f"TransformCodec({self.basis!r}, bits={self.bits:g})"


Codec = Literal["zstd"] | TransformCodec


@dataclass(frozen=True)
class Encoder:
    """facts: what a file says of its codec. encode: what it holds of a tensor with this name, None for all of it."""

    facts: dict[str, Any]
    encode: frames.Encode


def encoder_of(cache: "CompressedCache", model: PreTrainedModel, codec: Codec | None) -> Encoder | None:
    """The encoder of a cache's tensors, named as in a file, `layers.{index}.{name}`; None for no codec.

    Raises:
        TypeError: it is no codec.
        ValueError: it is not for this cache, or not for this model.
        ImportError: zstandard is not installed.
    """
    if codec is None:
        return None
    if codec != LOSSLESS and not isinstance(codec, TransformCodec):
        raise TypeError(f"codec must be {LOSSLESS!r}, a TransformCodec or None, got {codec!r}")
    frames.zstandard()
    if not isinstance(codec, TransformCodec):
        return Encoder({"codec": LOSSLESS}, frames.encode)
    coded: dict[str, tuple[int, Places]] = {}
    for index, layer in enumerate(cache.layers):
        plain = layer.plain_tokens()
        if plain is None:
            raise ValueError(
                "TransformCodec codes keys and values that are kept as they are, in DenseCache, HydragenCache, and "
                f"AcrossKVCache and SwiftKVCache over DenseCache; got a {type(cache).__name__}: save it with "
                f"codec={LOSSLESS!r}"
            )
        coded |= {f"layers.{index}.{name}": (index, places) for name, places in plain.items()}
    basis = Basis.given(codec.basis, model)
    transforms = _Transforms(model, basis)
    # a model whose RoPE cannot be undone is refused before anything is written
    transforms.check({index for index, _ in coded.values()})

    def encode(name: str, tensor: Tensor) -> EncodedTensor | None:
        if name not in coded:
            return frames.encode(name, tensor)
        index, places = coded[name]
        transform = transforms.of(index, places.side, tensor.device)
        coding = places.coding
        if coding is not None and coding.basis != transform.basis:
            # what another basis has coded would lose again
            return frames.encode(name, tensor)
        return EncodedTensor(TRANSFORM, transform_coding.encode(tensor, places, transform, codec.bits_of(places.side)))

    return Encoder({"codec": TRANSFORM, "bits": codec.bits, "basis": basis.digest}, encode)


class Decoder:
    """Decodes the tensors of a file that a TransformCodec wrote."""

    def __init__(self, model: PreTrainedModel, basis: Basis) -> None:
        self._transforms = _Transforms(model, basis)

    @classmethod
    def of(cls, model: PreTrainedModel, digest: str, path: str) -> "Decoder":
        """For the file `path`, which names its basis by this digest.

        Raises:
            ValueError: the model was not given that basis.
            ImportError: zstandard is not installed.
        """
        frames.zstandard()
        return cls(model, Basis.known(digest, model, path))

    def of_layer(self, index: int, device: torch.device, codings: dict[str, Coding]) -> Callable[[str], Decode]:
        """Decodes a layer's tensors onto its device, given their names; how each was coded is put into `codings`."""

        def decode(name: str, payload: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
            side = transform_coding.side_of(payload)
            transform = self._transforms.of(index, side, device)
            tensor, codings[name] = transform_coding.decode(payload, dtype, shape, transform, device)
            return tensor

        return lambda name: partial(decode, name)


class _Transforms:
    """Each layer's transforms, of one layer at a time on a device."""

    def __init__(self, model: PreTrainedModel, basis: Basis) -> None:
        self._model, self._basis = model, basis
        self._ropes: dict[int, Rope | None] = {}
        # of the layer that was asked for last, by side
        self._layer: int | None = None
        self._of_layer: dict[str, Transform] = {}

    def check(self, layers: set[int]) -> None:
        """Raises ValueError if a layer rotates keys in a way that cannot be undone."""
        for index in layers:
            self._rope(index)

    def _rope(self, index: int) -> Rope | None:
        if index not in self._ropes:
            self._ropes[index] = Rope.of(self._model, index)
        return self._ropes[index]

    def of(self, index: int, side: str, device: torch.device) -> Transform:
        if index != self._layer:
            self._layer, self._of_layer = index, {}
        held = self._of_layer.get(side)
        if held is None or held.mean.device != device:
            directions = getattr(self._basis.layers[index], side)
            rope = self._rope(index) if side == "keys" else None
            vectors = _orthonormal(directions.vectors.to(device))
            held = self._of_layer[side] = Transform(directions.mean.to(device), vectors, rope, self._basis.digest)
        return held


def _orthonormal(vectors: Tensor) -> Tensor:
    """Vectors [width, width], which float16 has rounded, as an orthonormal basis again: else what is coded over and
    over drifts by what they lack."""
    exact, turned = torch.linalg.qr(vectors)
    found: Tensor = exact * turned.diagonal().sign()
    return found
