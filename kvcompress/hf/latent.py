"""Multi-head latent attention (DeepSeek-V2, 2405.04434), computed from what such layers give their cache.

A token's keys and values in all heads are projections of one latent, and a key ends in a part with positions that all
heads share. Models give both to their cache, project what it returns to keys and values, and attend. Here the
projections go to the other side: queries are taken to the latent's space, attend there to latents as to keys of one KV
head, whose first numbers are the values, and the output is taken back. The result is the same, and only latents are
ever stored or read.
"""

import weakref
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.hf.calls import Shadow
from kvcompress.hf.modules import attention_modules, weight_of

# the tag that the attention function looks for
HANDLE = "_kvcompress_layer"


class _Expand(Shadow):
    """Shadows the method of an attention module that makes keys and values of latents, which ours need not."""

    name = "expand_kv"

    def __call__(self, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(latents, HANDLE, None) is not None:
            return latents, rotated
        expanded: tuple[Tensor, Tensor] = self.shadowed(latents, rotated)
        return expanded


def keep_latents(model: PreTrainedModel) -> None:
    """Makes a model's layers attend to latents where a cache of ours returns them.

    Raises:
        ValueError: a layer has no such method.
    """
    for module in attention_modules(model):
        # of a hybrid's layers, some may attend in another way
        if getattr(module, "kv_b_proj", None) is None:
            continue
        if not hasattr(type(module), _Expand.name):
            raise ValueError(
                f"{type(module).__name__} makes keys and values of latents in a way that kvcompress does not know; it "
                f"knows modules with {_Expand.name}, as in DeepSeek-V3"
            )
        if not isinstance(vars(module).get(_Expand.name), _Expand):
            shadowed: Any = module
            shadowed.expand_kv = _Expand(shadowed)


def expand_latents(model: PreTrainedModel) -> None:
    """Removes what `keep_latents` has put on a model's layers."""
    for module in attention_modules(model):
        if isinstance(vars(module).get(_Expand.name), _Expand):
            delattr(module, _Expand.name)


def up_projection(module: Any, like: Tensor) -> Tensor:
    """What makes keys and values of latents, [rank, heads, key width + value width]."""
    projection: nn.Module = module.kv_b_proj
    weight = weight_of(weakref.ref(projection), module.kv_lora_rank, like).to(like.dtype)
    by_head: Tensor = weight.unflatten(1, (-1, module.qk_nope_head_dim + module.v_head_dim))
    return by_head


def into_latents(module: Any, up: Tensor, query: Tensor) -> Tensor:
    """Queries [batch, heads, queries, head_dim] as they meet latents and shared keys, [..., rank + shared width]."""
    alone, shared = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    of_keys = up[..., : module.qk_nope_head_dim]
    absorbed = alone @ of_keys.permute(1, 2, 0)
    joined: Tensor = absorbed.new_empty(*absorbed.shape[:-1], absorbed.shape[-1] + shared.shape[-1])
    joined[..., : absorbed.shape[-1]], joined[..., absorbed.shape[-1] :] = absorbed, shared
    return joined


def from_latents(module: Any, up: Tensor, out: Tensor) -> Tensor:
    """Sums of latents [batch, heads, queries, rank] as sums of values, [batch, heads, queries, value_dim]."""
    of_values = up[..., module.qk_nope_head_dim :]
    taken: Tensor = out @ of_values.transpose(0, 1)
    return taken
