"""Finds the modules of a model and their devices, and records what goes into and out of them."""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.hf.configs import decoder_config, filling_layers, is_multimodal, layer_heads

# what is part of the name of an attention module's class
_ATTENTION = ("Attention", "MLA")
# what the projection behind attention is called: by Llama and most, OPT and others, GPT-NeoX and others
_PROJECTIONS = ("o_proj", "out_proj", "dense")
# the method in which modules of older families attend, to queries, keys, values and a mask; the classes of which it is
# known, and the attribute by which they divide logits, None for none
OWN_METHOD = "_attn"
DIVISORS = {"GPTNeoSelfAttention": None, "GPTNeoXJapaneseAttention": "norm_factor"}


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that turns tokens into hidden states, without the head."""
    return model.get_decoder()


def text_of(model: nn.Module) -> Any:
    """A model, or of a multimodal one the decoder: its towers keep no cache."""
    return decoder_of(model) if isinstance(model, PreTrainedModel) and is_multimodal(model) else model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Every attention module of the decoder that has a layer number, in the order of the modules."""
    return [
        module for module in text_of(model).modules() if _is_attention(module) and isinstance(_number_of(module), int)
    ]


def _is_attention(module: nn.Module) -> bool:
    return any(part in type(module).__name__ for part in _ATTENTION)


def attention_module(model: nn.Module, layer: int) -> nn.Module | None:
    """The attention module of a layer, None if there is none: the one that has its number, or one without a number that
    the layer contains, as where layers share the weights of one block (Zamba).

    Of a model that runs its modules several times, each run is a layer.
    """
    modules, number = attention_modules(model), layer
    config: Any = decoder_config(model) if hasattr(model, "config") else None
    if config is not None:
        number = dict(enumerate(filling_layers(config))).get(layer, layer)
    stack = getattr(config, "num_layers_per_stack", None)
    if stack is not None:
        run, number = divmod(layer, stack)
        # HRM-Text has one stack that ends a cycle, and one for what comes before
        decoder: Any = model.get_decoder() if isinstance(model, PreTrainedModel) else model
        ends_cycle = run % (config.L_cycles + 1) == config.L_cycles
        modules = attention_modules(decoder.H_module if ends_cycle else decoder.L_module)
    numbered = next((module for module in modules if layer_of(module) == number), None)
    if numbered is not None:
        return numbered
    return next(
        (
            module
            for name, module in text_of(model).named_modules(remove_duplicate=False)
            if f".layers.{layer}." in f".{name}"
            and _is_attention(module)
            and getattr(module, "layer_idx", 0) in (None, -1)
        ),
        None,
    )


def layer_of(module: nn.Module) -> int:
    """The number of the layer that an attention module belongs to, -1 if it has none."""
    number: int = _number_of(module, -1)  # type: ignore[assignment]
    return number


def _number_of(module: nn.Module, unknown: int | None = None) -> int | None:
    """What a module has for the number of its layer, under GPT-Neo's name too."""
    older = getattr(module, "layer_id", unknown) if type(module).__name__ in DIVISORS else unknown
    return getattr(module, "layer_idx", older)


def run_offset(arguments: dict[str, Any]) -> int:
    """What is added to an attention module's number to tell this run's layer, of the arguments of its forward."""
    offsets: list[int] = [arguments[name] for name in ("cycle_offset", "cache_offset") if name in arguments]
    return sum(offsets)


def defined_with(module: nn.Module, name: str) -> Any:
    """What the source file of a module's class, or of a class that this is built on, calls so; None if none does."""
    files = (vars(sys.modules[kind.__module__]) for kind in type(module).__mro__)
    return next((file[name] for file in files if name in file), None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, even if accelerate keeps its parameters elsewhere."""
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
    """Where a layer computes, and where its part of a cache is."""
    attention = attention_module(model, layer)
    return input_device(model) if attention is None else device_of(attention)


def output_projection(model: PreTrainedModel, layer: int) -> Callable[[Tensor], Tensor]:
    """A function that gives the weight behind a layer's attention, [heads, value_dim, hidden]; in a tensor-parallel
    model of the heads of this process. It takes a tensor with the values' dtype and device, and does not keep the
    model alive.

    Raises:
        ValueError: the layer has no such projection.
    """
    attention = attention_module(model, layer)
    found = next((part for name in _PROJECTIONS if (part := getattr(attention, name, None)) is not None), None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"the attention of layer {layer} of {type(model).__name__} has no output projection that kvcompress knows: "
            f"expected one named {', '.join(_PROJECTIONS)}"
        )
    config = decoder_config(model)
    own = layer_heads(config)[layer]
    # of latents, what they are expanded to
    value_dim = own.value_dim or config.v_head_dim
    return functools.partial(_weight_by_head, weakref.ref(found), own.heads, value_dim)


def _weight_by_head(of: weakref.ref[nn.Module], heads: int, value_dim: int, like: Tensor) -> Tensor:
    by_head: Tensor = weight_of(of, heads * value_dim, like).unflatten(0, (-1, value_dim))
    return by_head


@torch.no_grad()
def weight_of(of: weakref.ref[nn.Module], inputs: int, like: Tensor) -> Tensor:
    """The weight of a projection, [inputs, outputs], whatever it is kept in: in a tensor-parallel model that of this
    process. inputs: how many it has, if it does not say. like: of the dtype and on the device of what it projects."""
    projection = of()
    if projection is None:
        raise RuntimeError("the cache's model has been deleted")
    weight: Any = getattr(projection, "weight", None)
    weight = weight.to_local() if hasattr(weight, "to_local") else weight
    # other kinds of tensors are what quantizers put in place of a weight
    if type(projection) is nn.Linear and type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:
        weight = weight.T
    else:
        # quantized, kept elsewhere or of another kind: what it makes of each input alone
        inputs = getattr(projection, "in_features", inputs)
        ones = torch.eye(inputs, device=like.device, dtype=like.dtype)
        weight = projection(ones) - projection(torch.zeros_like(ones[:1]))
    found: Tensor = weight
    return found


class Captured:
    """Inputs and outputs of modules in the latest forward.

    with Captured(inputs=[first], outputs=layers) as captured:
        model(ids)
    captured.inputs[first]
    """

    def __init__(
        self, inputs: Iterable[nn.Module] = (), outputs: Iterable[nn.Module] = (), first: bool = False
    ) -> None:
        """
        Args:
            inputs: modules whose first positional argument is kept.
            outputs: modules whose output is kept; of a tuple, the first part.
            first: until `clear`, keep what came first instead of what came last.
        """
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self._first = first
        self._hooks = [module.register_forward_pre_hook(self._keep_input) for module in inputs]
        self._hooks += [module.register_forward_hook(self._keep_output) for module in outputs]

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not (self._first and module in self.inputs):
            self.inputs[module] = args[0]

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (self._first and module in self.outputs):
            self.outputs[module] = output[0] if isinstance(output, tuple) else output

    def clear(self) -> None:
        self.inputs, self.outputs = {}, {}

    def close(self) -> None:
        """Stops recording; what was kept stays."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def watched(
    module: nn.Module,
    begins: Callable[[tuple[Any, ...]], None],
    ended: Callable[[tuple[Any, ...], Any], None],
) -> Iterator[None]:
    """Within it, calls these as a module's forwards begin and end: with the values of all arguments, and the output.

    `ended` is called before other hooks are, such as those by which caches learn that a forward has ended.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            begins((*args, *kwargs.values()))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            ended((*args, *kwargs.values()), output)

    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_positions(model: nn.Module) -> None:
    """Forgets how far the positions of the last prompt were ahead of a count, which some multimodal models note."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            noted: Any = module
            noted.rope_deltas = None
