"""Which model this is: its config, as far as keys and values depend on it, and a sample of its weights.

Two models with one fingerprint give the same keys and values, up to rounding: the dtype is not part of it, and weights
are sampled as bfloat16. The sample is the same on every device, costs one copy per device, and reads a few numbers of
each tensor of the decoder. Not read are weights that accelerate has offloaded (they count as equal), and another
process's share of a tensor-parallel model (each process has its own fingerprint).
"""

import base64
import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.hf.configs import attention_windows, decoder_config, layer_heads, sizes
from kvcompress.hf.modules import decoder_of

# how many numbers are read of a tensor, and how many tensors at most
_NUMBERS, _TENSORS = 4, 1024
# parts of config names that do not affect the computation, or that are compared as sizes, windows or rope
_NO_MATTER = (
    *("_token", "_name", "architectures", "attn_impl", "chunk_size_feed", "context_len", "cross_attention", "decoder"),
    *("drop", "dtype", "encoder", "experts_impl", "gradient", "hidden_size", "init", "label", "layer_types", "loss"),
    *("max_position", "max_window", "model_type", "num_attention", "num_hidden", "num_key", "output_", "pretraining"),
    *("problem", "pruned", "return_dict", "rope", "rotary", "router_aux", "sliding_window", "swiftkv", "tie_"),
    *("torchscript", "use_cache", "version", "vocab"),
)
# characters of a line for a reader, at most, behind its name
_LINE = 100
# a bfloat16 that no weight has: stands for what was not read
_UNREAD = 0x7FFF


@dataclass(frozen=True)
class Fingerprint:
    """What tells one model from another.

    architecture: the model's class. sizes: layers, widths, heads. windows: of the layers, as text. rope: the config's
    rotary settings, as JSON. weights: base64 of bfloat16 numbers. is_float16: some weight is, so that its last bit as
    bfloat16 may differ. config: all other settings that affect the computation, as JSON; of two models, only settings
    that both have are compared, as a release may add some. Old files have none.
    """

    architecture: str
    sizes: str
    windows: str
    rope: str
    weights: str
    is_float16: bool
    config: str = "{}"

    @classmethod
    def of(cls, model: PreTrainedModel, without: frozenset[str] = frozenset()) -> Self:
        """The fingerprint of a model.

        Args:
            without: names of the decoder's weights to leave out.
        """
        config: Any = decoder_config(model)
        own = sizes(config)
        # a converted model computes differently while it is its own teacher
        taught = "" if getattr(model, "single_input", True) else " as its own teacher"
        if getattr(config, "swiftkv_own_last", 0):
            taught += " whose last tokens keep their own keys and values"
        if (between := getattr(config, "swiftkv_skip_between", None)) is not None:
            taught += f" and the others skip layers {between[0]} to {between[1] - 1} too"
        windows = attention_windows(config)
        kinds = sorted({window or 0 for window in windows})
        text = "full attention" if kinds == [0] else f"windows {','.join(str(window or 'none') for window in windows)}"
        rope = {
            name: getattr(config, name, None)
            for name in ("rope_parameters", "rope_theta", "partial_rotary_factor", "rotary_pct")
        }
        heads, kv_heads, head_dims, *_ = map(_of_layers, zip(*layer_heads(config), strict=True))
        weights, is_float16 = _sample(model, without)
        return cls(
            f"{type(model).__name__}{taught}",
            f"{own.layers} layers, hidden size {own.hidden}, {heads} heads, {kv_heads} KV heads, "
            f"head_dim {head_dims}, vocabulary {own.vocabulary}",
            text,
            json.dumps(_plain(rope), sort_keys=True),
            weights,
            is_float16,
            json.dumps(_computed(config.to_dict()), sort_keys=True, default=str),
        )

    def of_config(self) -> Self:
        """The same without weights, of which processes that share a model have different parts."""
        return replace(self, weights="")

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs in the other model; empty if it is the same."""
        names = ["architecture", "sizes", "windows", "rope"]
        found = [name for name in names if getattr(self, name) != getattr(other, name)]
        ours, theirs = json.loads(self.config), json.loads(other.config)
        found += [name for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
        return found if _agree(self, other) else [*found, "weights"]

    def check(self, given: "Fingerprint", what: str) -> None:
        """
        Args:
            what: the thing that was made with this model, for the message.

        Raises:
            ValueError: the given model is another one; the message describes both.
        """
        differ = self.differences(given)
        if differ:
            raise ValueError(
                f"{what} was made with {self.architecture} of {self.text()}; the model given, {given.architecture}, "
                f"has {given.text()}. They differ in {', '.join(differ)}, so keys and values of one are of no use to "
                "the other: give the model that it was made with, or make it again"
            )

    def lines(self, more: Mapping[str, Any]) -> list[str]:
        """The model and more facts, a short line each, for a reader."""
        rope: dict[str, Any] = {}
        for setting, value in json.loads(self.rope).items():
            rope |= value if isinstance(value, dict) else {setting: value}
        facts = {
            "model": self.architecture,
            "sizes": self.sizes,
            "attention": self.windows.replace(",", ", "),
            "rope": ", ".join(f"{name} {value}" for name, value in rope.items()),
            "weights": self._digest(),
            **more,
        }
        width = max(map(len, facts))
        short = {name: textwrap.shorten(str(value), _LINE, placeholder=" ...") for name, value in facts.items()}
        return [f"{name:<{width}}  {value}" for name, value in short.items() if value]

    def _digest(self) -> str:
        return hashlib.sha256(self.weights.encode()).hexdigest()[:12]

    def text(self) -> str:
        """Everything but the class, as text for a reader."""
        rope = "" if self.rope == "{}" else f", rope {self.rope}"
        return f"{self.sizes}, {self.windows}{rope}, weights {self._digest()}"


def _of_layers(sizes: tuple[int, ...]) -> str:
    """A size that each layer has, once where they do not differ."""
    return str(sizes[0]) if len(set(sizes)) == 1 else ",".join(map(str, sizes))


def _plain(value: Any) -> Any:
    """Settings without empty ones, as a release may add these."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    return value


def _computed(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain settings of a config that keys and values depend on and that the rest of the fingerprint does not have."""
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str | list) and not any(part in name for part in _NO_MATTER)
    }


@torch.no_grad()
def _sample(model: PreTrainedModel, without: frozenset[str]) -> tuple[str, bool]:
    """A sample of a decoder's weights, and whether any of them is float16."""
    left_out = {id(parameter) for name, parameter in model.named_parameters() if name in without}
    tensors: list[Any] = [tensor for tensor in decoder_of(model).parameters() if id(tensor) not in left_out]
    step = max(1, -(-len(tensors) // _TENSORS))
    chosen = tensors[::step]
    parts = [_numbers(tensor) for tensor in chosen]
    # one copy per device
    read = {}
    for device in {part.device for part in parts}:
        own = [part for part in parts if part.device == device]
        read[device] = iter(torch.cat(own).view(torch.int16).cpu().split([len(part) for part in own]))
    sample = torch.cat([next(read[part.device]) for part in parts]) if parts else torch.empty(0, dtype=torch.int16)
    is_float16 = any(tensor.dtype == torch.float16 for tensor in chosen)
    return base64.b64encode(sample.numpy().tobytes()).decode(), is_float16


def _numbers(tensor: nn.Parameter) -> Tensor:
    """A few numbers of a tensor as bfloat16, [numbers], on its device."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if local.device.type == "meta" or not local.numel():
        return torch.full((_NUMBERS,), _UNREAD, dtype=torch.int16).view(torch.bfloat16)
    flat = local.reshape(-1) if local.is_contiguous() else local.contiguous().reshape(-1)
    numbers = flat[len(flat) // (2 * _NUMBERS) :: max(1, len(flat) // _NUMBERS)][:_NUMBERS]
    return numbers.to(torch.bfloat16)


def _agree(one: Fingerprint, other: Fingerprint) -> bool:
    """True if all weights that both have read are equal."""
    ours, theirs = (
        torch.frombuffer(bytearray(base64.b64decode(each.weights)), dtype=torch.int16) if each.weights else None
        for each in (one, other)
    )
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return ours is theirs
    read = (ours != _UNREAD) & (theirs != _UNREAD)
    ours, theirs = ours[read], theirs[read]
    if torch.equal(ours, theirs):
        return True
    if one.is_float16 == other.is_float16:
        return False
    # rounded twice, so one bit may differ; float16's smallest numbers are as far apart as its least positive one
    a, b = ours.view(torch.bfloat16).double(), theirs.view(torch.bfloat16).double()
    return bool(((a - b).abs() <= 2.0**-7 * a.abs() + 2.0**-24).all())
