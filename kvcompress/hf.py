"""The two doors into transformers: its Cache interface, and one attention function with its mask function.

Every coupling to transformers' cache, attention and mask interfaces lies here, because those interfaces move.
In each attention layer a model calls `past_key_values.update(key, value, layer_idx)` and then the attention
function registered under `config._attn_implementation`. A kvcompress layer's `update` hangs itself on the key
tensor it returns; the attention function finds it there and lets it attend. A call whose key carries no such
handle goes to the implementation the model had before, so other caches and training are as they were.
"""

import functools
import inspect
import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "IMPLEMENTATION",
    "Attends",
    "Cache",
    "CacheLayerMixin",
    "TokensSeen",
    "attention_module",
    "attention_windows",
    "device_of",
    "hand_over",
    "head_counts",
    "input_device",
    "layer_device",
    "register",
    "select_attention",
    "text_config",
    "watch_forwards",
]

IMPLEMENTATION = "kvcompress"
_HANDLE = "_kvcompress_layer"
_WINDOWS = {"full_attention": None, "sliding_attention": "sliding_window"}
_UNSUPPORTED_BIASES = ("position_bias", "alibi", "attention_bias", "head_mask")


class Attends(Protocol):
    """What the attention function asks of a cache layer."""

    def attend(
        self,
        query: Tensor,
        visible: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor: ...


class TokensSeen(int):
    """A number of tokens, from a kvcompress cache: how the mask function knows whom it works for."""


def hand_over(key: Tensor, layer: Attends) -> Tensor:
    """The key tensor with the handle by which the attention function finds the layer."""
    # a view of its own: the caller's tensor stays free of the handle
    key = key.view_as(key)
    setattr(key, _HANDLE, layer)
    return key


def register() -> None:
    """Registers the attention and the mask function under the name kvcompress, over sdpa."""
    _register("sdpa")


def select_attention(model: PreTrainedModel) -> None:
    """Makes the model's attention layers call kvcompress, which passes on what is not its own.

    Raises:
        ValueError: the model's attention does not go through transformers' AttentionInterface.
    """
    current = model.config._attn_implementation or "sdpa"
    if current.startswith(IMPLEMENTATION):
        return
    name = _register(current)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not choose its attention through transformers' AttentionInterface, "
            "so its cache cannot be compressed; models that do: Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OPT"
        )


def watch_forwards(model: PreTrainedModel) -> None:
    """Makes the model tell its cache when a forward begins and when it has ended.

    It calls `forward_begins(decoder, input_ids)` and `forward_ended(decoder, input_ids)` of caches that have them.
    """
    decoder = model.get_decoder()
    if not any(getattr(hook, "func", None) is _tell for hook in decoder._forward_hooks.values()):
        decoder.register_forward_pre_hook(functools.partial(_tell, "forward_begins"), with_kwargs=True)
        decoder.register_forward_hook(functools.partial(_tell, "forward_ended"), with_kwargs=True)


def _tell(what: str, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any = None) -> None:
    if torch.compiler.is_compiling():
        # a decode step, after which nothing is to be done
        return
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    tell = getattr(given.get("past_key_values"), what, None)
    if tell is not None:
        tell(decoder, given.get("input_ids"))


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The decoder's config, where kvcompress can serve the model.

    Raises:
        ValueError: what the model has that kvcompress does not handle, by name.
    """
    config = model.config
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; kvcompress serves decoder-only models")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"{name} is multimodal; kvcompress serves text models: pass its language model")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{name} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}); "
            "kvcompress serves MHA, GQA and MQA"
        )
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        raise ValueError(
            f"{name} shares keys and values between layers (num_kv_shared_layers={shared}); "
            "kvcompress serves models whose layers each have their own"
        )
    return config


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, None for full attention.

    Raises:
        ValueError: a layer is neither; its type is named.
    """
    types, settings = get_layer_types_and_kwargs(config)
    for index, kind in enumerate(types):
        if kind not in _WINDOWS:
            raise ValueError(
                f"layer {index} of model type {config.model_type!r} is of type {kind!r}; "
                f"kvcompress serves {', '.join(_WINDOWS)}"
            )
    # transformers 5.17 has one dictionary of settings for all layers
    each = [settings] * len(types) if isinstance(settings, dict) else settings
    return [each[index].get("sliding_window") if _WINDOWS[kind] else None for index, kind in enumerate(types)]


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The attention module of a layer, None where no module says that it is."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer and "Attention" in type(module).__name__:
            return module
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, wherever accelerate keeps its parameters meanwhile."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return next(module.parameters()).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens."""
    return device_of(model.get_input_embeddings())


def layer_device(model: PreTrainedModel, layer: int) -> torch.device:
    """Where a layer computes, and its part of a cache lies."""
    attention = attention_module(model, layer)
    return input_device(model) if attention is None else device_of(attention)


def head_counts(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim of a config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim


def _register(previous: str) -> str:
    """Registers the pair of functions over an implementation, and returns their name."""
    # "flash" in a name makes transformers look for flash-attention
    name = IMPLEMENTATION if previous == "sdpa" else f"{IMPLEMENTATION}_{previous.replace('flash', 'fl')}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, functools.partial(_attention, previous=previous))
        AttentionMaskInterface.register(name, functools.partial(_mask, previous=previous))
    return name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    previous: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    layer: Attends | None = getattr(key, _HANDLE, None)
    if layer is None:
        return _previous_attention(module, previous)(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "kvcompress takes a padding mask [batch, tokens seen] or none, because it never builds a "
            f"queries x tokens mask; got a mask of shape {list(attention_mask.shape)}"
        )
    for name in _UNSUPPORTED_BIASES:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention, which kvcompress does not support"
            )
    if kwargs.get("dropout"):
        raise ValueError("a kvcompress cache is for inference: call model.eval(), attention dropout is on")
    if kwargs.get("is_causal") is False:
        raise ValueError("a kvcompress cache serves causal attention; got is_causal=False")
    scale = kwargs.get("scaling")
    # nothing that is held may keep the graph of a whole forward alive
    with torch.no_grad():
        out = layer.attend(
            query,
            attention_mask,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            position_ids=kwargs.get("position_ids"),
        )
    if torch.is_grad_enabled() and query.requires_grad:
        out = _WithoutGradient.apply(out, query)
    return out.transpose(1, 2).contiguous(), None


class _WithoutGradient(torch.autograd.Function):
    """An output whose gradient is asked for in vain, so that none is silently wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a kvcompress cache is for inference: no gradient passes through it; train with use_cache=False"
        )


def _previous_attention(module: nn.Module, previous: str) -> Any:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(previous, eager)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    previous: str,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    if not isinstance(kv_length, TokensSeen):
        return ALL_MASK_ATTENTION_FUNCTIONS[previous](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    # transformers forbids the skip for an overlay on the causal mask, and while decoding with a compileable cache
    if not allow_is_causal_skip and q_length > 1:
        raise ValueError(
            "this call overlays the causal mask (packed sequences, bidirectional blocks or a custom mask function); "
            "kvcompress serves plain causal and sliding-window attention with padding"
        )
    if attention_mask is None:
        return None
    if torch.compiler.is_compiling():
        return attention_mask[:, -q_length:]
    if attention_mask.shape[-1] not in (kv_length, q_length):
        raise ValueError(
            f"attention_mask must cover the {int(kv_length)} tokens seen, or the {q_length} new ones; "
            f"got {list(attention_mask.shape)}"
        )
    # the compiled step wants a mask that does not grow: past tokens carry their padding in their slots
    return attention_mask[:, -q_length:] if q_length == 1 and attention_mask.is_cuda else attention_mask


register()
