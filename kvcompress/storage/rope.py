"""Rotary position embeddings as the given model applies them: rotates a key or query to a position, and back.

RoPE turns each pair (a, b) of a vector's dimensions by the angle `position * inv_freq`:

    rotate:    (a, b) -> s * (a cos - b sin, b cos + a sin)
    unrotate:  (a, b) -> (a cos + b sin, b cos - a sin) / s

s is the attention scaling (not 1 for YaRN). Which dimensions pair up (half a vector apart as in Llama, side by side
as in Cohere), how many are rotated (a part in Phi and GPT-NeoX), with which frequencies (two sets in Gemma 3) and
whether a layer rotates at all (not all do in SmolLM3) differs between models. Only this module knows: it takes what the
model's rotary module says, and checks its conclusion against two keys that the layer itself has rotated.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf

# types whose frequencies do not change as a sequence grows
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")
# an error that a wrong pairing or frequency exceeds by far, and bfloat16 does not
_AGREES = 0.05
NOT_FINITE = "its weights hold NaN or infinity, or its dtype is too narrow for them"


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotary embedding of one layer.

    inv_freq: [rotary_dim / 2] float32, the angle of each pair per position. scaling: factor of a rotated vector.
    interleaved: pairs are neighbours (0, 1), (2, 3), ...; else half of rotary_dim apart.
    Dimensions from rotary_dim on are left as they are.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, layer: int) -> Self | None:
        """The rotary embedding of a layer of a model; None if the layer has none.

        Raises:
            ValueError: the model's RoPE changes its frequencies with the length (dynamic, longrope), or is applied
                in a way that kvcompress does not know; the message names the model and the RoPE type.
        """
        name = f"layer {layer} of {type(model).__name__}"
        rotary = hf.rotary_of(model, layer)
        if rotary is None:
            return None
        if rotary.rope_type not in _STATIC:
            raise ValueError(
                f"{name} has RoPE of type {rotary.rope_type!r}, whose frequencies change with the length of the "
                f"sequence; keys can be rotated back only for the types {', '.join(_STATIC)}"
            )
        at = torch.tensor([[3, 11]], device=rotary.inv_freq.device)
        resting, turned = rotary.keys(at * 0), rotary.keys(at)
        if torch.equal(resting, turned):
            return None
        if not bool(resting.isfinite().all()):
            raise ValueError(f"{name} makes keys that are not finite: {NOT_FINITE}")
        for interleaved in (False, True):
            rope = cls(rotary.inv_freq, rotary.scaling, interleaved)
            expected = rope.rotate(rope.unrotate(resting.float(), at * 0), at)
            if (expected - turned.float()).norm() <= _AGREES * turned.float().norm():
                return rope
        raise ValueError(
            f"{name} does not rotate its keys as its {rotary.name} says: expected pairs half of rotary_dim apart "
            "(Llama), or side by side (Cohere)"
        )

    @property
    def rotary_dim(self) -> int:
        """How many of a vector's dimensions are rotated."""
        return 2 * self.inv_freq.shape[0]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates vectors without a position to these positions.

        Args:
            x: [..., head_dim].
            positions: integers that broadcast to x's shape without head_dim.

        Returns:
            A tensor of x's shape and dtype; computed in at least float32.
        """
        return self.turn(x, *self.turns(positions))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undoes `rotate`."""
        cos, sin = self.turns(positions)
        return self.turn(x, cos / self.scaling**2, -sin / self.scaling**2)

    def rotate_average(self, x: Tensor, first: Tensor, count: int) -> Tensor:
        """The mean of `rotate(x, p)` over the positions p = first, ..., first + count - 1.

        Args:
            x: [..., head_dim].
            first: integers that broadcast to x's shape without head_dim.
        """
        # a geometric series: the rotation to the middle, shortened by what the rotations around it cancel
        cos, sin = self.turns(first + (count - 1) / 2)
        half = self.inv_freq.to(first.device) / 2
        shortening = torch.where(half == 0, 1.0, (count * half).sin() / (count * half.sin()))
        return self.turn(x, cos * shortening, sin * shortening)

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every pair's angle times the scaling, [*positions, rotary_dim / 2] float32 each."""
        # float32 angles, as models compute them: at large positions, only equal rounding is undone exactly
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates pairs by given cosines and sines, which broadcast to [..., rotary_dim / 2]."""
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
