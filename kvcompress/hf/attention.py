"""The two interfaces to transformers: its Cache, and one attention function with its mask function.

In each attention layer a model calls its cache's `update(key, value, layer_idx)` and then the attention function
registered under `config._attn_implementation`. A kvcompress layer's `update` tags the key tensor that it returns with
itself; the attention function finds it there and lets it attend. A call whose key carries no tag goes to the
implementation the model had before, so other caches and training are unaffected; if the forward was given a kvcompress
cache, such a call is an error.
"""

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.hf.biases import ask_by_distance, ask_by_key
from kvcompress.hf.calls import (
    AttendingCache,
    Cache,
    Shadow,
    cache_in,
    forward_in_progress,
    is_watched,
    unwatch_forwards,
)
from kvcompress.hf.configs import block_of, decoder_config, has_biases, is_indexed, latent_rank
from kvcompress.hf.indexer import BlockChoice, Choice, PoolChoice, only_chosen, put_off_indexers, run_indexers
from kvcompress.hf.latent import HANDLE, expand_latents, from_latents, into_latents, keep_latents, up_projection
from kvcompress.hf.masks import as_columns, shown_and_spans, shows_nothing_more, spans_of, with_spans
from kvcompress.hf.modules import DIVISORS, OWN_METHOD, attention_modules, defined_with, layer_of, text_of
from kvcompress.hf.versions import warn_of_untested_release
from kvcompress.kernels.common.logits import LogitSpec

IMPLEMENTATION = "kvcompress"
# the implementation under each name of ours
_PREVIOUS: dict[str, str] = {}
# implementations that take what an indexer chooses as a mask, which models make themselves where they have these names
_MASKED = {"eager", "sdpa"}
# keyword arguments of an attention call: those used, and those that do not change which token attends to which
_HEEDED = {"dropout", "is_causal", "position_ids", "s_aux", "scaling", "sliding_window", "softcap"}
# and those of layers with biases by distance: the biases, and logits of each query that belong to no token
_OF_BIASES = {"position_bias", "sinks"}
_WITHOUT_EFFECT = {
    "cache_position", "layer_type", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "use_cache",
    # what a converted model passes to its layers
    "single_input",
}  # fmt: skip


class Attends(Protocol):
    """What the attention function needs of a cache layer.

    window: in tokens, None for full attention. latent_rank: width of the latents that it holds, None for keys and
    values. has_biases: by distance. kv_heads: of what it was given.
    """

    window: int | None
    latent_rank: int | None
    has_biases: bool

    @property
    def kv_heads(self) -> int: ...

    def belongs_to(self, module: nn.Module, is_watched: bool) -> None: ...

    def attend(
        self,
        query: Tensor,
        visible: Tensor | None,
        spec: LogitSpec,
        *,
        sinks: Tensor | None,
        position_ids: Tensor | None,
        spans: Tensor | None,
        choice: Choice | None,
        biases: Tensor | None,
    ) -> Tensor: ...


class TokensSeen(int):
    """A number of tokens, from a kvcompress cache: by this type the mask function knows the cache is one of ours."""


class TokensIndexed(TokensSeen):
    """The same of a model whose indexers choose what tokens attend to, and read the mask that attention takes."""


# what a compiled step feeds: torch 2.11 cannot trace the construction of one
ONE_TOKEN = TokensSeen(1)


def tag_key(key: Tensor, layer: Attends) -> Tensor:
    """The key tensor with the tag by which the attention function finds the layer."""
    # tag a view, so that the caller's tensor stays untagged
    key = key.view_as(key)
    setattr(key, HANDLE, layer)
    return key


def register() -> None:
    """Registers the attention and the mask function under the name kvcompress, over sdpa."""
    _register("sdpa")


def select_attention(model: PreTrainedModel) -> None:
    """Makes the model's attention layers call kvcompress, which passes on calls that are not for its caches.

    Raises:
        ValueError: the model's attention does not go through transformers' AttentionInterface.
    """
    warn_of_untested_release()
    current = attention_name(model) or "sdpa"
    if current.startswith(IMPLEMENTATION):
        return
    name = _register(current)
    set_attention(model, name)
    if attention_name(model) != name:
        raise ValueError(
            f"{type(model).__name__} does not choose its attention through transformers' AttentionInterface, "
            "so its cache cannot be compressed; models that do: Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OPT"
        )
    if latent_rank(decoder_config(model)) is not None:
        keep_latents(model)
    if is_indexed(decoder_config(model)):
        put_off_indexers(model)
    if has_biases(decoder_config(model)):
        ask_by_distance(model)
    if hasattr(model, _BatchesContinuously.name):
        setattr(model, _BatchesContinuously.name, _BatchesContinuously(model))


def restore_attention(model: PreTrainedModel) -> None:
    """Gives the model back the attention implementation it had before `select_attention`."""
    previous = _PREVIOUS.get(attention_name(model) or "")
    if previous is not None:
        set_attention(model, previous)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Makes the model's attention layers call the function of this name, if they can; those that attend in a method of
    their own call it in place of ours."""
    text = text_of(model)
    if text._can_set_attn_implementation():
        text.set_attn_implementation(name)
        return
    modules: list[Any] = attention_modules(model)
    if not modules or not all(type(module).__name__ in DIVISORS for module in modules):
        return
    for each in modules:
        if name in _PREVIOUS:
            setattr(each, OWN_METHOD, _InMethod(each))
        else:
            vars(each).pop(OWN_METHOD, None)
    # it says how masks are made
    text.config._attn_implementation = name


class _InMethod(Shadow):
    """Shadows the method in which a module of an older family attends (GPT-Neo, GPT-NeoX-Japanese)."""

    name = OWN_METHOD

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        module = self.model
        if getattr(key, HANDLE, None) is None:
            _check_no_cache_was_given(module, forward_in_progress(module), {})
            return self.shadowed(query, key, value, attention_mask)
        divisor = DIVISORS[type(module).__name__]
        scaling = 1.0 if divisor is None else 1.0 / getattr(module, divisor)
        out, weights = _attention(module, query, key, value, attention_mask, previous="eager", scaling=scaling)
        return out.transpose(1, 2), weights


def release(model: PreTrainedModel) -> None:
    """Restores a model as it was before a cache was built for it: its attention, its hooks, its methods.

    Building a cache selects kvcompress's attention function in the model, which passes on what does not come through a
    cache, and hooks the model's forwards. Caches that were built for the model no longer work with it: build new ones.
    """
    unwatch_forwards(model)
    expand_latents(model)
    run_indexers(model)
    ask_by_key(model)
    restore_attention(model)


class _BatchesContinuously(Shadow):
    """Continuous batching has its own cache, and needs the attention name that the model had before."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        restore_attention(self.model)
        return self.shadowed(*args, **kwargs)


def attention_name(module: nn.Module) -> str | None:
    """The name of the attention function that a model, or a layer of one, calls."""
    config: Any = decoder_config(module)
    return config._attn_implementation


def _register(previous: str) -> str:
    """Registers both functions on top of an implementation, and returns their name."""
    # "flash" in a name makes transformers look for flash-attention
    name = IMPLEMENTATION if previous == "sdpa" else f"{IMPLEMENTATION}_{previous.replace('flash', 'fl')}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        _PREVIOUS[name] = previous
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
    layer: Attends | None = getattr(key, HANDLE, None)
    if layer is None:
        given = None if torch.compiler.is_compiling() else forward_in_progress(module)
        # an earlier layer's keys, moved to the device of this one, which shares them, or copies
        layer = None if given is None else given[1].untagged(layer_of(module))
    if layer is None:
        if getattr(module, "is_causal", True) or hasattr(module, "layer_idx"):
            # others attend to no tokens before
            _check_no_cache_was_given(module, given, kwargs)
        if previous in _MASKED:
            attention_mask = only_chosen(attention_mask, kwargs.pop("indices", None), key)
        return _previous_attention(module, previous)(module, query, key, value, attention_mask, **kwargs)
    if not torch.compiler.is_compiling():
        layer.belongs_to(module, is_watched())
    choice = next((value for value in (attention_mask, *kwargs.values()) if isinstance(value, Choice)), None)
    if isinstance(choice, BlockChoice):
        visible, spans = choice.shown, None
    else:
        visible, spans = shown_and_spans(choice.shown if isinstance(choice, PoolChoice) else attention_mask)
    if visible is not None and visible.dim() != 2:
        raise ValueError(
            "kvcompress takes a padding mask [batch, tokens seen] or none, because it never builds a "
            f"queries x tokens mask; got a mask of shape {list(visible.shape)}"
        )
    heeded = _HEEDED | _OF_BIASES if layer.has_biases else _HEEDED
    for name, value in kwargs.items():
        is_known = name in heeded or name in _WITHOUT_EFFECT or isinstance(value, Cache | Choice)
        if value is not None and not is_known:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention, which kvcompress does not know; it "
                f"supports attention with {', '.join(sorted(heeded))}"
            )
    window = kwargs.get("sliding_window", layer.window)
    if window != layer.window:
        raise ValueError(
            f"{type(module).__name__} in layer {layer_of(module)} attends within a window of {window}, where the "
            f"model's config says {layer.window}; kvcompress does not support this model"
        )
    if kwargs.get("dropout"):
        raise ValueError("a kvcompress cache is for inference, but attention dropout is on: call model.eval()")
    if kwargs.get("is_causal") is False:
        raise ValueError("a kvcompress cache supports only causal attention; got is_causal=False")
    if layer.has_biases and not is_watched():
        raise RuntimeError(
            f"{type(module).__name__} attends outside of a forward of its model, where kvcompress does not get its "
            "biases by distance; run the model, or this layer without a cache"
        )
    sinks = kwargs.get("s_aux")
    if kwargs.get("sinks") is not None:
        sinks = kwargs["sinks"][..., 0]
    scale = kwargs.get("scaling")
    is_latent = layer.latent_rank is not None
    times = 1 if is_latent else key.shape[1] // layer.kv_heads
    if times > 1:
        # copies of all KV heads, one time after another: the query heads of each belong together
        query = query.unflatten(1, (times, -1)).transpose(1, 2).flatten(1, 2)
    # without autograd: what is held must not keep the graph of a whole forward alive
    with torch.no_grad():
        up = up_projection(module, query) if is_latent else None
        out = layer.attend(
            query if up is None else into_latents(module, up, query),
            visible,
            LogitSpec(query.shape[-1] ** -0.5 if scale is None else scale, window, kwargs.get("softcap")),
            sinks=sinks,
            position_ids=kwargs.get("position_ids"),
            spans=spans,
            choice=choice,
            biases=kwargs.get("position_bias"),
        )
        if up is not None:
            out = from_latents(module, up, out)
    if times > 1:
        out = out.unflatten(1, (-1, times)).transpose(1, 2).flatten(1, 2)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _WithoutGradient.apply(out, query)
    return out.transpose(1, 2).contiguous(), None


def _check_no_cache_was_given(
    module: nn.Module, given: tuple[nn.Module, AttendingCache] | None, kwargs: dict[str, Any]
) -> None:
    """Raises RuntimeError where this attention belongs to a forward, as `forward_in_progress` gives it, that was given
    a kvcompress cache."""
    if torch.compiler.is_compiling():
        return
    model = "" if given is None else f" of {type(given[0]).__name__}"
    cache = cache_in(kwargs.values()) if given is None else given[1]
    if not isinstance(cache, AttendingCache):
        return
    raise RuntimeError(
        f"{type(module).__name__} in layer {layer_of(module)}{model} attends without the {type(cache).__name__} that "
        "its model was given: it did not pass its keys through the cache's update. kvcompress does not support models "
        "with layers that bypass their cache; run it without this cache"
    )


class _WithoutGradient(torch.autograd.Function):
    """An output that raises when its gradient is asked for, so that none is silently wrong."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a kvcompress cache is for inference: no gradient passes through it; train with use_cache=False"
        )


def _previous_attention(module: nn.Module, previous: str) -> Any:
    return ALL_ATTENTION_FUNCTIONS.get_interface(previous, defined_with(module, "eager_attention_forward"))


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
    spans = None
    # indexers of blocks find what is visible by it
    takes_bools = isinstance(kv_length, TokensIndexed) and block_of(kwargs["config"]) is not None
    # transformers forbids the skip for an overlay on the causal mask, and while decoding with a compileable cache
    if not allow_is_causal_skip and q_length > 1 and not shows_nothing_more(kwargs.get("mask_function")):
        spans = spans_of(kwargs["mask_function"])
        if spans is None:
            raise ValueError(
                "this call overlays the causal mask (packed sequences or a custom mask function); kvcompress supports "
                "plain causal and sliding-window attention with padding, and images whose tokens see one another"
            )
    if attention_mask is None:
        if isinstance(kv_length, TokensIndexed) and spans is None:
            # they take a part of it
            none = torch.ones(batch_size, 0, dtype=torch.bool, device=kwargs["device"])
            return none[:, None, None] if takes_bools else as_columns(none)
        return None if spans is None else with_spans(None, spans, kv_length, q_length)
    if torch.compiler.is_compiling():
        return attention_mask[:, -q_length:]
    if attention_mask.shape[-1] not in (kv_length, q_length):
        raise ValueError(
            f"attention_mask must cover the {int(kv_length)} tokens seen, or the {q_length} new ones; "
            f"got {list(attention_mask.shape)}"
        )
    if spans is not None:
        return with_spans(attention_mask, spans, kv_length, q_length)
    if isinstance(kv_length, TokensIndexed):
        return attention_mask[:, None, None] if takes_bools else as_columns(attention_mask)
    # the compiled step needs a mask that does not grow: slots record which past tokens are padding
    return attention_mask[:, -q_length:] if q_length == 1 and attention_mask.is_cuda else attention_mask


register()
