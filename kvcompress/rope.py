"""Rotary position embeddings as the model at hand applies them: rotating a key or query to a position, and back.

RoPE turns each pair (a, b) of a vector's dimensions by the angle `position * inv_freq`:

    rotate:    (a, b) -> s * (a cos - b sin, b cos + a sin)
    unrotate:  (a, b) -> (a cos + b sin, b cos - a sin) / s

s is the attention scaling (not 1 for YaRN). Which dimensions pair up (half a vector apart as in Llama, side by side
as in Cohere), how many turn (a part in Phi and GPT-NeoX), with which frequencies (two sets in Gemma 3) and whether a
layer turns them at all (not all do in SmolLM3) differs between models. This is the only module that knows, and the
only one beside hf.py that reaches into transformers: it reads the model's rotary module, and checks what it
concluded against two keys that the layer's own attention module makes.
"""

import inspect
import sys
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress import hf

# their frequencies do not change while a sequence grows
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")
_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
# what a wrong pairing or frequency exceeds by far, and bfloat16 does not
_AGREES = 0.05


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotary embedding of one layer.

    inv_freq: [rotary_dim / 2] float32, the angle of each pair a position. scaling: factor of a rotated vector.
    interleaved: pairs are neighbours (0, 1), (2, 3), ...; else half of rotary_dim apart.
    Dimensions from rotary_dim on are left as they are.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, layer: int) -> Self | None:
        """The rotary embedding of a layer of a model; None where the layer has none.

        Raises:
            ValueError: the model's RoPE changes its frequencies with the length (dynamic, longrope), or is applied
                in a way that kvcompress does not know; model and RoPE type are named.
        """
        name = f"layer {layer} of {type(model).__name__}"
        attention = hf.attention_module(model, layer)
        found = _rotary(model, layer)
        if found is None or attention is None or "position_embeddings" not in _parameters(attention):
            # a model without RoPE has no code for it either
            source = vars(sys.modules[type(model).__module__])
            if found is None and not any("rotary" in known.lower() or "rope" in known.lower() for known in source):
                return None
            raise ValueError(
                f"{name} applies rotary embeddings in a way of its own; kvcompress knows attention layers that take "
                "position_embeddings=(cos, sin), as Llama, Qwen, Gemma, Phi-3, GPT-NeoX and Cohere have"
            )
        rotary, kind, inv_freq = found
        rope_type = getattr(rotary, "rope_type", "default")
        rope_type = rope_type[kind] if isinstance(rope_type, dict) else rope_type
        if rope_type not in _STATIC:
            raise ValueError(
                f"{name} has RoPE of type {rope_type!r}, whose frequencies change with the length of the sequence; "
                f"keys can be rotated back for the types {', '.join(_STATIC)}"
            )
        scaling = float(getattr(rotary, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0))
        frequencies = inv_freq.detach().float().to(hf.device_of(attention), copy=True)

        at = torch.tensor([[3, 11]], device=frequencies.device)
        resting, turned = (_key(attention, rotary, kind, model, places.to(inv_freq.device)) for places in (at * 0, at))
        if torch.equal(resting, turned):
            return None
        for interleaved in (False, True):
            rope = cls(frequencies, scaling, interleaved)
            expected = rope.rotate(rope.unrotate(resting.float(), at * 0), at)
            if (expected - turned.float()).norm() <= _AGREES * turned.float().norm():
                return rope
        raise ValueError(
            f"{name} does not rotate its keys as its {type(rotary).__name__} says: neither with pairs half of "
            "rotary_dim apart (Llama) nor side by side (Cohere)"
        )

    @property
    def rotary_dim(self) -> int:
        """How many of a vector's dimensions turn."""
        return 2 * self.inv_freq.shape[0]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns vectors that have no position to these positions.

        Args:
            x: [..., head_dim].
            positions: integers that broadcast to x's shape without head_dim.

        Returns:
            As x in shape and dtype; computed in at least float32.
        """
        return self.turn(x, *self.turns(positions))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Takes back `rotate`."""
        cos, sin = self.turns(positions)
        return self.turn(x, cos / self.scaling**2, -sin / self.scaling**2)

    def rotate_average(self, x: Tensor, first: Tensor, count: int) -> Tensor:
        """The mean of `rotate(x, p)` over the positions p = first, ..., first + count - 1.

        Args:
            x: [..., head_dim].
            first: integers that broadcast to x's shape without head_dim.
        """
        # a geometric series: the turn to the middle, shortened by what the turns around it cancel
        cos, sin = self.turns(first + (count - 1) / 2)
        half = self.inv_freq.to(first.device) / 2
        shortening = torch.where(half == 0, 1.0, (count * half).sin() / (count * half.sin()))
        return self.turn(x, cos * shortening, sin * shortening)

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every pair's angle times the scaling, [*positions, rotary_dim / 2] float32 each."""
        # float32 angles, as the models compute them: far out, only what was rounded alike is rotated back exactly
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns pairs by given cosines and sines, which broadcast to [..., rotary_dim / 2]."""
        rotary_dim = self.rotary_dim
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turning = wide[..., :rotary_dim]
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turning[..., : rotary_dim // 2], turning[..., rotary_dim // 2 :]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        if rotary_dim < x.shape[-1]:
            rest = wide[..., rotary_dim:].expand(*turned.shape[:-1], -1)
            turned = torch.cat((turned, rest), -1)
        return turned.to(x.dtype)


class _Captured(Exception):  # noqa: N818 (it carries a result, and ends the attention call early)
    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key


class _Recorder:
    """Stands in for a cache, and ends the forward with the key it was given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Captured(key_states)


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _rotary(model: PreTrainedModel, layer: int) -> tuple[nn.Module, str | None, Tensor] | None:
    """The rotary module that serves a layer, the layer type it knows it by (None: it knows one), and its inv_freq."""
    types = getattr(model.config, "layer_types", None)
    kind = types[layer] if types else None
    found: list[tuple[nn.Module, str | None, Tensor]] = []
    for module in model.modules():
        for key, buffer in ((None, "inv_freq"), (kind, f"{kind}_inv_freq")):
            inv_freq = getattr(module, buffer, None)
            if isinstance(inv_freq, Tensor):
                found.append((module, key, inv_freq))
    if any(not torch.equal(inv_freq.cpu(), found[0][2].cpu()) for _, _, inv_freq in found[1:]):
        names = sorted({type(module).__name__ for module, _, _ in found})
        raise ValueError(
            f"{type(model).__name__} has several rotary modules of different frequencies ({', '.join(names)}); "
            "kvcompress cannot tell which one serves which layer"
        )
    return found[0] if found else None


@torch.no_grad()
def _key(
    attention: nn.Module, rotary: nn.Module, kind: str | None, model: PreTrainedModel, positions: Tensor
) -> Tensor:
    """The keys a layer's attention module hands to its cache, [1, kv_heads, tokens, head_dim], for fixed input.

    The positions are on the device of the rotary module, which need not be the layer's.
    """
    weight, device = next(attention.parameters()), hf.device_of(attention)
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions.shape[1], model.config.hidden_size, generator=generator)
    hidden = hidden.to(dtype)
    known = {"layer_type": kind} if kind else {}
    parameters = _parameters(attention)
    arguments: dict[str, Any] = {name: None for name in ("attention_mask", "alibi") if name in parameters}
    arguments |= {name: _Recorder() for name in _CACHE_ARGUMENTS if name in parameters}
    try:
        turns = tuple(turn.to(device) for turn in rotary(hidden.to(positions.device), positions, **known))
        attention(hidden.to(device), position_embeddings=turns, **arguments)
    except _Captured as captured:
        return captured.key
    except Exception as error:
        raise ValueError(
            f"{type(attention).__name__} could not be asked how it rotates its keys, so kvcompress cannot rotate them"
        ) from error
    raise ValueError(f"{type(attention).__name__} did not hand its keys to the cache, so kvcompress cannot rotate them")
