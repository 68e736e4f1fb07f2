"""In which directions the keys and values of a model vary, of all KV heads of a layer together, measured once.

Keys before RoPE hardly depend on their place, and those of all heads of a layer move together: in the basis of their
principal components most numbers hardly vary, and need few bits or none. (Keys without RoPE are of low rank:
arXiv:2410.21465; a basis calibrated once, and entropy codes for files: KVTC, arXiv:2511.01815.)

    x = mean + vectors @ y        y = vectors^T (x - mean), of variance `variances`, falling

`kvcompress/caches/calibration.py` measures one; `GEARCache(model, basis=...)` and `save(codec=...)` use it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.storage.durable import write_whole
from kvcompress.storage.key_codec import Directions as Directions
from kvcompress.storage.key_codec import KeyCodec
from kvcompress.storage.rope import Rope
from kvcompress.storage.tensor_file import TensorFile, told, write_tensors

_FORMAT = "kvcompress-basis-1"
# by digest, those that a model was given, for as long as it lives
_OF_MODELS: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, "Basis"]] = weakref.WeakKeyDictionary()

# of a model by digest, layer, bits, device and dtype, those that caches use
_CODECS: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakValueDictionary[Any, KeyCodec]] = (
    weakref.WeakKeyDictionary()
)


class LayerBasis(NamedTuple):
    """The directions of a layer's keys, without RoPE, and of its values."""

    keys: Directions
    values: Directions


@dataclass(frozen=True, repr=False, eq=False)
class Basis:
    """Directions of keys and values, of each layer of a model.

        basis = Basis.load("basis.safetensors")
        cache = GEARCache(model, bits=2, basis=basis)

    layers: of each layer.
    model: of which model; a cache refuses it for another one.
    measured: on what, as facts that JSON can hold.
    """

    layers: tuple[LayerBasis, ...]
    model: hf.Fingerprint
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(cls, basis: "Basis | str | os.PathLike[str]") -> "Basis":
        """A basis, or the one in a file; TypeError for anything else, and errors as of `load`."""
        if isinstance(basis, Basis):
            return basis
        if not isinstance(basis, str | os.PathLike):
            raise TypeError(f"basis must be a Basis or the path of its file, got {type(basis).__name__}")
        return cls.load(basis)

    @classmethod
    def given(cls, basis: "Basis | str | os.PathLike[str]", model: PreTrainedModel) -> "Basis":
        """A basis, or the one in a file, which the model then keeps: saved caches only name theirs.

        Raises:
            TypeError: it is neither.
            ValueError: as `load` and `check`.
        """
        found = cls.opened(basis)
        found.check(model)
        return _OF_MODELS.setdefault(model, {}).setdefault(found.digest, found)

    @classmethod
    def known(cls, digest: str, model: PreTrainedModel, what: str = "what the file holds") -> "Basis":
        """The basis with this digest that the model was given.

        Args:
            what: what needs it, for the message.

        Raises:
            ValueError: the model was not given it.
        """
        held = _OF_MODELS.get(model, {})
        if digest not in held:
            raise ValueError(
                f"{what} was coded in the basis {digest}, which has a file of its own: pass that, as basis=...; this "
                f"model was given {', '.join(sorted(held)) or 'none'}"
            )
        return held[digest]

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError unless this is the model that the basis was made for, whole in this process."""
        check_whole(model)
        self.model.check(hf.Fingerprint.of(model), "the basis")

    def codec(self, model: PreTrainedModel, layer: int, bits: float) -> KeyCodec:
        """What packs and decodes the keys of a layer of its model; caches that are alike share it."""
        device = hf.layer_device(model, layer)
        name = layer, bits, device, model.dtype
        codecs = _CODECS.setdefault(model, weakref.WeakValueDictionary())
        found = codecs.get((self.digest, *name))
        if found is None:
            kv_heads = hf.layer_heads(hf.text_config(model))[layer].kv_heads
            found = KeyCodec(self.layers[layer].keys, kv_heads, Rope.of(model, layer), bits, device, model.dtype)
            codecs[(self.digest, *name)] = found
        return found

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell this basis from any other."""
        found = hashlib.sha256()
        for layer in self.layers:
            for directions in layer:
                for tensor in directions:
                    found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to one safetensors file, which replaces an existing one only when it is complete.

        Raises:
            ValueError: JSON cannot hold the facts.
            OSError: the file cannot be written; an existing one is still there.
        """
        path = Path(path)
        measured = told(self.measured, "how the basis was measured")
        facts = {"fingerprint": dataclasses.asdict(self.model), "measured": measured}

        def parts() -> Any:
            for index, layer in enumerate(self.layers):
                tensors = {}
                for side, directions in layer._asdict().items():
                    for name, tensor in directions._asdict().items():
                        stored = tensor if name == "variances" else tensor.half()
                        tensors[f"layers.{index}.{side}.{name}"] = stored
                yield tensors, {}

        def write(file: BinaryIO) -> str:
            write_tensors(file, _FORMAT, facts, parts)
            return path.name

        write_whole(path.parent, path.name, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a basis that `save` wrote, on the CPU.

        Raises:
            ValueError: the file is no basis, or is damaged.
            OSError: it cannot be read.
        """
        with TensorFile(path) as file:
            file.check_format(_FORMAT, "a basis", "kvcompress calibrate or measure_basis")
            try:
                facts = json.loads(file.metadata["facts"])
                layers = []
                for index in range(len(facts["parts"])):
                    sides = [
                        Directions(
                            *(file.tensor(f"layers.{index}.{side}.{name}").float() for name in Directions._fields)
                        )
                        for side in LayerBasis._fields
                    ]
                    layers.append(LayerBasis(*sides))
                model, measured = hf.Fingerprint(**facts["fingerprint"]), dict(facts["measured"])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{file.path} holds no basis that this release of kvcompress reads ({error}); measure it again"
                ) from error
        return cls(tuple(layers), model, measured)

    def __repr__(self) -> str:
        width = self.layers[0].keys.mean.shape[0] if self.layers else 0
        return f"<Basis of {self.model.architecture}: {len(self.layers)} layers, {width} numbers a token's keys>"

    def __str__(self) -> str:
        """The model, what it was measured on, and how many directions hold nine tenths of the variance."""
        lines = self.model.lines(self.measured)
        lines.append(f"{'layer':>9}  directions with 90 % of the variance: of keys, of values")
        for index, layer in enumerate(self.layers):
            most = [f"{nine_tenths(side.variances):>5}" for side in layer]
            lines.append(f"{index:>9}  {' '.join(most)}  of {len(layer.keys.mean)}")
        return "\n".join(lines)


def nine_tenths(variances: Sequence[float] | Tensor) -> int:
    """How many of falling variances make up 90 % of their sum."""
    shares = torch.as_tensor(variances, dtype=torch.float64).cumsum(0)
    return int((shares < 0.9 * shares[-1]).sum()) + 1


def check_whole(model: PreTrainedModel) -> None:
    """Raises ValueError if other processes hold some of the model's KV heads, or some layers have none."""
    if not hf.all_attend(hf.text_config(model)):
        raise ValueError(
            f"{type(model).__name__} has layers that keep states, or no keys and values of their own; a basis is of "
            "all layers"
        )
    if TPGroup.of(model) is not None:
        raise ValueError(
            "a basis spans all KV heads of a layer, but this process has only some of them: load the model without "
            "tp_plan"
        )
