"""How a cache is passed to a model: under which name, and what happens around a forward that was given one.

transformers renamed the argument in 5.24, from past_key_values to cache, in every forward and in generate. Here a cache
among arguments is found by its type. For a model that a cache was built for, both names work on every release: a hook
passes a cache on under the name that the model's forward takes, and where generate knows only the older name, two of
the model's own methods are shadowed by ones that know both.
"""

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.utils import ModelOutput

from kvcompress.hf.configs import decoder_config, fillers_of, without_windows
from kvcompress.hf.modules import decoder_of

__all__ = [
    "CACHE_SPELLINGS",
    "AttendingCache",
    "Cache",
    "CacheLayerMixin",
    "awaits_attention",
    "cache_argument",
    "cache_in",
    "cache_of",
    "forward_in_progress",
    "full_cache",
    "take_cache",
    "watch_forwards",
]

# the argument's name since transformers 5.24, and before
CACHE_SPELLINGS = ("cache", "past_key_values")
_OTHER_SPELLINGS = ("past_key_value", "layer_past")


class AttendingCache(Cache):
    """A cache whose layers compute attention themselves, and which is told of the forwards of its model."""

    # its forwards read what another cache holds, which then chooses what to keep
    reads_again = False
    # generate's next forward would feed a whole prompt, part of which the cache has seen
    whole_prompt_comes = False
    # what the running generation feeds to ended rows, and the ids that end rows, as filler_tokens returns them
    fillers: tuple[int | None, list[int]] | None = None

    def prompt_begins(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Called before generate feeds a prompt that it has whole; generate then leaves out the columns seen.

        Args:
            input_ids: [batch, tokens], with the tokens seen before. attention_mask: of the same shape, or None.
        """

    def forward_comes(self) -> None:
        """Called before generate feeds a forward, outside of what it compiles: here a compiled step is made ready."""

    def is_traceable(self, tokens: int) -> bool:
        """Whether torch.compile can trace a forward of so many tokens into one graph."""
        return False

    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Called before the decoder runs; input_ids [batch, tokens] are the tokens fed, None for embeddings."""

    def untagged(self, layer_idx: int) -> Any:
        """The cache's layer to which this layer of the model attends where its keys are others than it was given by
        `update`; None for none."""
        return None

    def awaits_attention(self) -> bool:
        """Whether a layer was given keys, and has not attended yet."""
        return False

    def check_given(self, fed: Tensor | None, attention_mask: Any, position_ids: Any) -> None:
        """Called before the decoder runs, after `forward_begins`, with what it is given: raises where it cannot be.

        Args:
            fed: tokens [batch, tokens] or embeddings [batch, tokens, hidden].
        """

    def forward_ended(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Called after the decoder has run without an exception."""


class _Forwards(threading.local):
    """Forwards in progress that were given a cache, innermost last: the module, the cache, and what keeps torch.compile
    out of the forward, or None."""

    def __init__(self) -> None:
        # weak: the caller holds them, and an interrupted forward must not keep them alive
        self.stack: list[tuple[weakref.ref[nn.Module], weakref.ref[AttendingCache], Any]] = []


_FORWARDS = _Forwards()


def cache_name(module: nn.Module) -> str | None:
    """The name of the parameter by which a module's forward takes its cache; None if it has none.

    For a forward that takes any keywords, it is the one of the class that it extends.
    """
    return _cache_parameter(module.forward) or _cache_name_of(module, "forward")


def _cache_name_of(module: nn.Module, method: str) -> str | None:
    """The name by which a method takes a cache; for one that takes any keywords, in the class that it extends."""
    extended = (vars(kind)[method] for kind in type(module).__mro__ if method in vars(kind))
    return next((name for each in extended if (name := _cache_parameter(each)) is not None), None)


def _cache_parameter(function: Callable[..., Any]) -> str | None:
    """A parameter with a known name, else one that is annotated as a Cache."""
    parameters = inspect.signature(function).parameters
    for name in (*CACHE_SPELLINGS, *_OTHER_SPELLINGS):
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        annotation = parameter.annotation
        said = annotation if isinstance(annotation, str) else repr(annotation)
        if annotation is not parameter.empty and "Cache" in said:
            return name
    return None


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as the keyword argument that a module's forward, or a model's generate, takes: `model(ids, **this)`.

    Raises:
        TypeError: the forward has no parameter for a cache.
    """
    name = cache_name(module)
    if name is None:
        raise TypeError(
            f"{type(module).__name__}.forward has no parameter for a cache, got {inspect.signature(module.forward)}"
        )
    return {name: cache}


def unread(decoder: nn.Module, ids: Tensor) -> dict[str, Any]:
    """What else a decoder's forward over ids [batch, columns] takes, padded on the left, whose output nobody reads.

    A converted model (swiftkv) is told that only the last column is asked for, as where a prompt's last logits are, so
    that the others skip what they can; other decoders are told nothing.
    """
    if ids.shape[1] == 1 or "asked" not in inspect.signature(decoder.forward).parameters:
        return {}
    return {"asked": torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)}


def cache_in(arguments: Iterable[Any]) -> Cache | None:
    """The first cache among values, whatever their names."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward or generate returned, under either name; None if it returned none."""
    return cache_in(output.values() if isinstance(output, ModelOutput) else output)


def take_cache(arguments: dict[str, Any], positional: tuple[Any, ...] = ()) -> Cache | None:
    """The cache among arguments; removes it, and cache arguments that are None, from the keyword arguments."""
    found = cache_in(positional)
    for name in list(arguments):
        value = arguments[name]
        if isinstance(value, Cache):
            found = arguments.pop(name)
        elif value is None and name in CACHE_SPELLINGS:
            del arguments[name]
    return found


def forward_in_progress(part: nn.Module) -> tuple[nn.Module, AttendingCache] | None:
    """The module and the cache of the innermost forward in progress that was given a cache and contains this part."""
    for entered, given, _ in reversed(_FORWARDS.stack):
        module, cache = entered(), given()
        # a forward interrupted from the keyboard never ended, so either may be gone
        if module is not None and cache is not None and any(each is part for each in module.modules()):
            return module, cache
    return None


def is_watched() -> bool:
    """Whether a forward that was given a cache, of a model that a cache was built for, is in progress."""
    return bool(_FORWARDS.stack)


def awaits_attention() -> bool:
    """Whether the innermost forward in progress that was given a cache has come to a layer's attention."""
    cache = _FORWARDS.stack[-1][1]() if _FORWARDS.stack else None
    return cache is not None and cache.awaits_attention()


def _forget(module: nn.Module) -> AttendingCache | None:
    """Ends a module's forward in progress, and those within it, and returns its cache; None if it had none."""
    stack = _FORWARDS.stack
    for index, (entered, cache, _) in enumerate(stack):
        if entered() is module:
            for *_, eager in reversed(stack[index:]):
                if eager is not None:
                    eager.__exit__(None, None, None)
            del stack[index:]
            return cache()
    return None


# types whose decoder takes, with use_cache, no cache but of a class of its own; without, it uses what it is given
_CACHES_OF_THEIR_OWN = {"minimax": "MiniMaxCache"}


def full_cache(model: PreTrainedModel, windows: bool = True) -> Any:
    """The cache that transformers would make for a model, which keeps everything.

    Args:
        windows: False to keep what has left a window, too.
    """
    own = _CACHES_OF_THEIR_OWN.get(decoder_of(model).config.model_type)
    if own is not None:
        return getattr(sys.modules[type(decoder_of(model)).__module__], own)()
    return DynamicCache(config=model.config if windows else without_windows(decoder_config(model)))


def watch_forwards(model: PreTrainedModel) -> None:
    """Makes a model tell an AttendingCache when a forward begins and has ended, and take any cache by either name."""
    decoder = decoder_of(model)
    for module in {id(module): module for module in (model, decoder)}.values():
        if any(getattr(hook, "func", None) is _before for hook in module._forward_pre_hooks.values()):
            continue
        known: dict[str, Any] = {"name": cache_name(module), "is_decoder": module is decoder}
        module.register_forward_pre_hook(functools.partial(_before, **known), with_kwargs=True)
        # also after an exception, so that the forward does not count as still in progress
        module.register_forward_hook(functools.partial(_after, **known), with_kwargs=True, always_call=True)
    takes = _cache_name_of(model, "prepare_inputs_for_generation")
    shadowed: Any = model
    for kind in (_Prefill, _Candidates, _Inputs):
        if hasattr(type(model), kind.name) and not isinstance(vars(model).get(kind.name), Shadow):
            setattr(shadowed, kind.name, kind(model))
    if takes is not None and takes != CACHE_SPELLINGS[0] and "generate" not in vars(model):
        methods: Any = model
        methods.generate = _Generate(model)
        methods._prepare_generation_config = _GenerationArguments(model)


def unwatch_forwards(model: PreTrainedModel) -> None:
    """Removes what `watch_forwards` has put on a model."""
    for module in {id(module): module for module in (model, decoder_of(model))}.values():
        for hooks, ours in ((module._forward_pre_hooks, _before), (module._forward_hooks, _after)):
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is ours]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
    for name in [name for name, value in vars(model).items() if isinstance(value, Shadow)]:
        delattr(model, name)


def _before(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str | None,
    is_decoder: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    changed = None
    if name is not None and kwargs.get(name) is None:
        for other in CACHE_SPELLINGS:
            if other != name and isinstance(kwargs.get(other), Cache):
                changed = {key: value for key, value in kwargs.items() if key not in (name, other)}
                changed[name] = kwargs[other]
                kwargs = changed
    # caches are not told of compiled steps
    if not torch.compiler.is_compiling():
        _forget(module)
        cache = cache_in((*args, *kwargs.values()))
        if isinstance(cache, AttendingCache):
            if kwargs.get("output_attentions"):
                raise ValueError(
                    f"{type(cache).__name__} gives no attention weights, as no queries x keys matrix is ever built; "
                    "leave output_attentions off, or run the model with use_cache=False"
                )
            _FORWARDS.stack.append((weakref.ref(module), weakref.ref(cache), _eager(module, cache, args, kwargs)))
            if is_decoder:
                decoder: Any = module
                if decoder.config.model_type in _CACHES_OF_THEIR_OWN:
                    changed = {**kwargs, "use_cache": False}
                if hasattr(decoder, "_maybe_slice_kv_shared_inputs"):
                    # Gemma 4 leaves queries out of layers that share keys and values, and cuts masks of transformers'
                    # own making to fit; not where it is not told how many logits are asked for
                    changed = {**kwargs, "logits_to_keep": None}
                ids = _tokens(args, kwargs)
                cache.forward_begins(module, ids)
                fed = kwargs.get("inputs_embeds") if ids is None else ids
                cache.check_given(fed, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    return None if changed is None else (args, changed)


def _after(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    name: str | None,
    is_decoder: bool,
) -> None:
    if torch.compiler.is_compiling():
        return
    cache = _forget(module)
    if output is None or cache is None:
        return
    if is_decoder:
        cache.forward_ended(module, _tokens(args, kwargs))
    _name_both_ways(output)


def _eager(module: nn.Module, cache: AttendingCache, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Keeps torch.compile out of a compiled forward if the cache cannot be traced; None if nothing needs to be done."""
    if not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
        return None
    ids = _tokens(args, kwargs)
    fed = kwargs.get("inputs_embeds") if ids is None else ids
    if fed is not None and cache.is_traceable(fed.shape[1]):
        return None
    return torch.compiler.set_stance("force_eager")


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return kwargs.get("input_ids", args[0] if args else None)


def _name_both_ways(output: Any) -> None:
    """Adds `output.cache`, as 5.24 does, if transformers is older; 5.24 itself knows the older name."""
    held = cache_of(output) if isinstance(output, ModelOutput) else None
    if held is not None and not hasattr(output, CACHE_SPELLINGS[0]):
        setattr(output, CACHE_SPELLINGS[0], held)


class Shadow:
    """Shadows a method in one model; an object of a class, and not a closure, so that the model can be pickled."""

    name: str

    def __init__(self, model: PreTrainedModel) -> None:
        # weak: the model holds this object, and must still be freed with its last user
        self._model = weakref.ref(model)
        shadow: Any = self
        functools.update_wrapper(shadow, getattr(type(model), self.name))

    @property
    def model(self) -> Any:
        return self._model()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)

    def shadowed(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


def _tell_prompt(input_ids: Tensor, config: Any, kwargs: Mapping[str, Any]) -> AttendingCache | None:
    """Tells the cache among a generation's arguments its whole prompts, and returns it; None if there is no cache, or
    if generate has only the new part of the prompts."""
    cache = cache_in(kwargs.values())
    mask = kwargs.get("attention_mask")
    # generate drops a mask that hides nothing
    covers = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    if not isinstance(cache, AttendingCache):
        return None
    cache.whole_prompt_comes = False
    cache.fillers = fillers_of(config)
    if covers != input_ids.shape[1] or kwargs.get("inputs_embeds") is not None:
        return None
    cache.prompt_begins(input_ids, mask)
    return cache


class _Prefill(Shadow):
    """Shadows the method of generate that has the whole prompts before it feeds the new part of them."""

    name = "_prefill"

    def __call__(self, input_ids: Tensor, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        _tell_prompt(input_ids, generation_config, model_kwargs)
        return self.shadowed(input_ids, generation_config, model_kwargs, *args, **kwargs)


class _Candidates(Shadow):
    """The same in assisted generation, which feeds the whole prompt, seen or not."""

    name = "_get_candidate_generator"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _tell_prompt(kwargs["input_ids"], kwargs["generation_config"], kwargs["model_kwargs"])
        if cache is not None:
            cache.whole_prompt_comes = cache.get_seq_length() > 0
        return self.shadowed(*args, **kwargs)


class _Inputs(Shadow):
    """Shadows the method of generate that prepares the arguments of a forward."""

    name = "prepare_inputs_for_generation"

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs.values())
        if isinstance(cache, AttendingCache):
            if cache.whole_prompt_comes:
                cache.whole_prompt_comes = False
                kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
            cache.forward_comes()
        return self.shadowed(input_ids, *args, **kwargs)


class _GenerationArguments(Shadow):
    """Before 5.24, shadows the method of generate that tells the model's arguments from the settings.

    A caller may have looked up generate before the cache was built, so generate itself cannot be shadowed for this.
    """

    name = "_prepare_generation_config"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        newer, older = CACHE_SPELLINGS
        given = kwargs.pop(newer, None)
        if given is not None:
            if kwargs.get(older) is not None:
                raise ValueError(f"generate takes one cache: {newer}=... or {older}=..., not both")
            kwargs[older] = given
        return self.shadowed(*args, **kwargs)


class _Generate(Shadow):
    """Before 5.24, shadows generate, so that its output has the cache under both names."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.shadowed(*args, **kwargs)
        _name_both_ways(output)
        return output
