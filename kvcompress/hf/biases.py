"""Biases of logits by distance (Inkling).

An attention module has a part that makes one for each query and key, from its hidden states and how far apart both are.
For a cache of ours it is asked for those of each query at distances 0, 1, ..., in place of distances to keys.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcompress.hf.calls import awaits_attention
from kvcompress.hf.modules import attention_modules

# what attention modules call that part
_PARTS = ("rel_logits_proj", "relative_position_bias")


def ask_by_distance(model: PreTrainedModel) -> None:
    """Has a model's layers make biases by distance where they are for a cache of ours.

    Raises:
        ValueError: a layer has no part for it that kvcompress knows.
    """
    for module in attention_modules(model):
        part = _part(module)
        if part is None:
            raise ValueError(
                f"{type(module).__name__} makes biases by distance in a way that kvcompress does not know; it knows "
                f"modules with {' or '.join(_PARTS)}, as in Inkling"
            )
        if _ask not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_ask, with_kwargs=True)


def ask_by_key(model: PreTrainedModel) -> None:
    """Takes back `ask_by_distance`."""
    parts = [part for module in attention_modules(model) if (part := _part(module)) is not None]
    for part in parts:
        for key in [key for key, hook in part._forward_pre_hooks.items() if hook is _ask]:
            del part._forward_pre_hooks[key]
            part._forward_pre_hooks_with_kwargs.pop(key, None)


def _part(module: nn.Module) -> nn.Module | None:
    return next((part for name in _PARTS if (part := getattr(module, name, None)) is not None), None)


def _ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_compiling() or not awaits_attention():
        return None
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    told = given.arguments
    if "relative_distance" in told:
        distances = told["relative_distance"]
        counted = torch.arange(module.rel_extent, device=distances.device)
        told["relative_distance"] = counted.expand(distances.shape[0], -1)
    else:
        places = told["query_positions"]
        told["query_positions"] = torch.zeros_like(places)
        told["key_positions"] = -torch.arange(module.rel_extent, device=places.device)
    return given.args[1:], given.kwargs
