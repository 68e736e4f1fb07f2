"""How a model computes its rotary embeddings: the module, its frequencies, and keys as a layer rotates them."""

import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvcompress.hf.calls import Cache, cache_argument
from kvcompress.hf.configs import decoder_config, is_multimodal, layer_kind
from kvcompress.hf.modules import attention_module, device_of, text_of


@dataclass(frozen=True)
class Rotary:
    """The facts of a layer's rotary module.

    name: the module's. rope_type: transformers' name for how frequencies are computed. scaling: of a rotated vector.
    inv_freq: [rotary_dim / 2] float32 on the layer's device. keys: gives the keys that the layer passes to its cache
    for a fixed input at positions [1, tokens], as [1, kv_heads, tokens, head_dim].
    """

    name: str
    rope_type: str
    scaling: float
    inv_freq: Tensor
    keys: Callable[[Tensor], Tensor]


def rotary_of(model: PreTrainedModel, layer: int) -> Rotary | None:
    """The rotary embedding of a layer; None if the model has none.

    Raises:
        ValueError: the model has rotary embeddings that kvcompress cannot find or tell apart, or whose keys it cannot
            obtain.
    """
    attention = attention_module(model, layer)
    config = decoder_config(model)
    rotations, own = getattr(config, "rope_parameters", None) or {}, layer_kind(config, layer)
    if own in rotations and rotations[own] is None:
        # layers of one kind have none
        return None
    found = _rotary_module(model, layer)
    takes = {} if attention is None else inspect.signature(attention.forward).parameters
    if found is None or attention is None or "position_embeddings" not in takes:
        if found is None and not _rotates(model, attention, takes):
            return None
        raise ValueError(
            f"layer {layer} of {type(model).__name__} applies rotary embeddings in its own way; kvcompress knows "
            "attention layers that take position_embeddings=(cos, sin), like those of Llama, Qwen, Gemma, Phi-3, "
            "GPT-NeoX and Cohere"
        )
    module, kind, inv_freq = found
    if has_several_axes(model):
        raise ValueError(
            f"{type(model).__name__} gives images positions of several axes, from which kvcompress cannot take keys "
            "back: use a cache that leaves them rotated"
        )
    rope_type = getattr(module, "rope_type", "default")
    rope_type = rope_type[kind] if isinstance(rope_type, dict) else rope_type
    scaling = float(getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0))
    frequencies = inv_freq.detach().float().to(device_of(attention), copy=True)

    def keys(positions: Tensor) -> Tensor:
        return _keys(attention, module, kind, model, positions.to(inv_freq.device))

    return Rotary(type(module).__name__, rope_type, scaling, frequencies, keys)


def _rotates(model: PreTrainedModel, attention: nn.Module | None, takes: Collection[str]) -> bool:
    """Whether a layer may rotate queries and keys though no module of the model holds frequencies.

    Several hybrids, such as Jamba, only carry the code for it.
    """
    if not any(map(_is_rotary, vars(sys.modules[type(model).__module__]))):
        return False
    if attention is None or any(_is_rotary(type(module).__name__) for module in text_of(model).modules()):
        return True
    if "position_embeddings" in takes:
        # which nobody makes
        return False
    methods = (each for kind in type(attention).__mro__[: -len(nn.Module.__mro__)] for each in vars(kind).values())
    codes = (inspect.unwrap(method).__code__ for method in methods if inspect.isfunction(method))
    return any(_is_rotary(name) for code in codes for name in code.co_names)


def _is_rotary(name: str) -> bool:
    return "rotary" in name.lower() or "rope" in name.lower()


def has_rotary(model: PreTrainedModel, layer: int) -> bool:
    """Whether a layer has a rotary embedding, known or not."""
    try:
        return rotary_of(model, layer) is not None
    except ValueError:
        return True


def has_several_axes(model: PreTrainedModel) -> bool:
    """Whether the positions of tokens may have several axes, as those of images have in Qwen-VL and others."""
    config = decoder_config(model)
    told = "mrope_section" in str(getattr(config, "rope_parameters", None))
    has = told or any(hasattr(module, "mrope_section") for module in text_of(model).modules())
    # a text model of its own has one axis, whatever it was made of
    is_text = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (has or not is_text) if is_multimodal(model) else (has and not is_text)


def _rotary_module(model: PreTrainedModel, layer: int) -> tuple[nn.Module, str | None, Tensor] | None:
    """The rotary module of a layer, its name for the layer's type (None if it has one type), and its inv_freq."""
    kind = layer_kind(decoder_config(model), layer)
    found: list[tuple[nn.Module, str | None, Tensor]] = []
    for module in text_of(model).modules():
        for key, buffer in ((None, "inv_freq"), (kind, f"{kind}_inv_freq")):
            inv_freq = getattr(module, buffer, None)
            if isinstance(inv_freq, Tensor):
                found.append((module, key, inv_freq))
    if any(not torch.equal(inv_freq.cpu(), found[0][2].cpu()) for _, _, inv_freq in found[1:]):
        names = sorted({type(module).__name__ for module, _, _ in found})
        raise ValueError(
            f"{type(model).__name__} has several rotary modules of different frequencies ({', '.join(names)}); "
            "kvcompress cannot tell which one belongs to which layer"
        )
    return found[0] if found else None


class _KeyTaken(Exception):  # noqa: N818 (it carries a result, and ends the attention call early)
    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key


class _KeyTaker(Cache):
    """Stands in for a cache, and ends the forward with the key that it was given."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _KeyTaken(key_states)


@torch.no_grad()
def _keys(
    attention: nn.Module, rotary: nn.Module, kind: str | None, model: PreTrainedModel, positions: Tensor
) -> Tensor:
    """The keys that a layer's attention module passes to its cache for a fixed input, [1, kv_heads, tokens, head_dim].

    The positions are on the rotary module's device, which may differ from the layer's.
    """
    weight, device = next(attention.parameters()), device_of(attention)
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions.shape[1], decoder_config(model).hidden_size, generator=generator)
    hidden = hidden.to(dtype)
    known = {"layer_type": kind} if kind else {}
    # all that it insists on behind the hidden states: a mask, and what comes after the keys are rotated
    _, *others = inspect.signature(attention.forward).parameters.values()
    insists = (each.name for each in others if each.default is each.empty and "VAR" not in each.kind.name)
    arguments: dict[str, Any] = dict.fromkeys(insists)
    try:
        arguments |= cache_argument(attention, _KeyTaker())
        turns = rotary(hidden.to(positions.device), positions, **known)
        # cosines and sines, or complex numbers that are both
        is_one = isinstance(turns, Tensor)
        arguments["position_embeddings"] = turns.to(device) if is_one else tuple(turn.to(device) for turn in turns)
        attention(hidden.to(device), **arguments)
    except _KeyTaken as taken:
        return taken.key
    except Exception as error:
        raise ValueError(
            f"{type(attention).__name__} could not be run to see how it rotates its keys, so kvcompress cannot rotate "
            "them"
        ) from error
    raise ValueError(f"{type(attention).__name__} did not pass its keys to the cache, so kvcompress cannot rotate them")
