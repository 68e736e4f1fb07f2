"""Converts a model to SwiftKV: the same weights, in a class whose later layers take one common input."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.caches.budget import count_or_fraction
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.forward import Between, projection
from kvcompress.swiftkv.model import CONVERTED, SwiftKVModel, common_norm


def convert(
    model: PreTrainedModel,
    skip_from: int | float | Literal["auto"] = 0.5,
    share: int = 1,
    *,
    own_last: int = 0,
    skip_between: tuple[int, int] | None = None,
    rows: Sequence[Row] | None = None,
    tokenizer: Any = None,
) -> Any:
    """A SwiftKV model with the weights of a model, which is not changed; the two share them.

    The common norm begins as the input norm of the first later layer; queries, keys and values begin as the later
    layers' own. In a group, keys and values begin as the mean over its layers.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3, Gemma 2 or 3 (text), Granite, OLMo 2 or 3, Phi-3 or SmolLM3 model.
        skip_from: the first layer that prompts skip: its index, or a fraction of the layers. "auto" fits conversions
            of all, and takes the cheapest that still retrieves (kvcompress/swiftkv/frontier.py); it is fitted.
        share: consecutive later layers that share one set of keys and values (AcrossKV), a divisor of their number.
        own_last: as many tokens at the end of a prompt, at least, run the later layers, and they and all that are
            generated have keys and values of their own, as before the conversion: it then loses much less, and a prompt
            of N tokens skips the later layers of N - own_last. Not in the paper, and only with share=1; 0: none.
        skip_between: (12, 14): these N - own_last tokens skip layers 12 and 13 too, for which a linear map stands in,
            and run those between 13 and skip_from. It needs a fit, and own_last; not in the paper. None: they run all.
        rows: for "auto", what to fit to and measure on, as of `read_rows`. tokenizer: for "auto", the model's.

    Raises:
        ValueError: the model's family is not supported, the model is spread over devices or quantised, the later
            layers cannot be grouped like this, own_last is below 0 or goes with share, or skip_between is no span
            before skip_from or without own_last; with "auto", if no conversion keeps enough.
    """
    if skip_from == "auto":
        from kvcompress.swiftkv.frontier import best_conversion

        if rows is None or tokenizer is None:
            raise ValueError('skip_from="auto" measures: it needs rows (of read_rows) and the tokenizer')
        return best_conversion(model, tokenizer, rows, share, own_last=own_last, skip_between=skip_between)
    if rows is not None:
        raise ValueError(
            f'rows are for skip_from="auto", got skip_from={skip_from!r}; fit(model, first_rows(rows, 16384)) '
            "fits afterwards"
        )
    if isinstance(model, SwiftKVModel):
        raise ValueError(f"this {type(model).__name__} was converted before; convert the model that it was made of")
    if type(model) not in CONVERTED:
        served = ", ".join(kind.__name__ for kind in CONVERTED)
        raise ValueError(f"SwiftKV converts {served}; got {type(model).__name__}")
    if getattr(model.config, "use_bidirectional_attention", False):
        raise ValueError(f"SwiftKV converts causal models; this {type(model).__name__} attends both ways")
    places = hf.spread_over(model)
    if len(set(places.values())) > 1:
        raise ValueError(f"convert needs {type(model).__name__} on one device, got {places}")
    config = model.config
    layers = config.num_hidden_layers
    first = first_later(skip_from, layers)
    kind = CONVERTED[type(model)]
    fields = config.to_dict()
    fields.pop("model_type", None)
    fields |= {"num_key_value_layers": first, "key_value_group_size": share, "swiftkv_teacher": True}
    fields |= {"swiftkv_own_last": own_last, "swiftkv_skip_between": skip_between}
    settings = kind.config_class.from_dict({**fields, "architectures": [kind.__name__]})
    settings._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        converted = kind(settings)
    _take_over(converted, model)
    for start in range(first, layers, share):
        _begin(converted.model.layers[start : start + share], model.model.layers[start : start + share])
    converted.model.norm_swiftkv = common_norm(model.model.layers, first)
    if skip_between is not None:
        _begin_between(converted.model, model.model, *skip_between)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def first_later(skip_from: int | float, layers: int) -> int:
    """The index of the first later layer, given as an index or as a fraction of the layers."""
    skip_from = count_or_fraction(skip_from, "skip_from", "a layer", "the layers")
    if isinstance(skip_from, float):
        return max(1, round(skip_from * layers))
    if not 1 <= skip_from <= layers:
        raise ValueError(f"skip_from must be a layer from 1 to {layers}, got {skip_from}")
    return skip_from


def _take_over(converted: Any, model: Any) -> None:
    """Moves a model's modules, with their weights, into the converted model, which was built without any."""
    converted.lm_head = model.lm_head
    for name, module in model.model.named_children():
        if name != "layers":
            setattr(converted.model, name, module)
    for to, of in zip(converted.model.layers, model.model.layers, strict=True):
        for name, module in of.named_children():
            if name != "self_attn":
                setattr(to, name, module)
        for name, module in of.self_attn.named_children():
            if isinstance(getattr(module, "weight", None), Tensor) and not module.weight.is_floating_point():
                raise ValueError(f"convert needs floating-point weights; {name} is a {type(module).__name__}")
            setattr(to.self_attn, name, module)


@torch.no_grad()
def _begin(later: Any, layers: Any) -> None:
    """Sets the initial weights of a group of later layers."""
    for index, (to, of) in enumerate(zip(later, layers, strict=True)):
        # a group has its own queries, and the mean of its keys and values
        _set_projections(to.self_attn, [of.self_attn], "q")
        if index == 0:
            _set_projections(to.self_attn, [layer.self_attn for layer in layers], "kv")


def _set_projections(to: Any, sources: Sequence[Any], names: str) -> None:
    """Sets projections ("q", "k", "v") of a later attention to the mean of those of its sources."""
    for name in names:
        setattr(to, f"{name}_proj_swiftkv", _mean([_projection(attention, name) for attention in sources]))
        if hasattr(sources[0], f"{name}_norm"):
            norms = [getattr(attention, f"{name}_norm") for attention in sources]
            setattr(to, f"{name}_norm_swiftkv", _mean(norms))


@torch.no_grad()
def _begin_between(decoder: Any, of: Any, start: int, stop: int) -> None:
    """Sets the initial weights of what stands in for a span: its own keys and values, and a map to nothing."""
    for to, layer in zip(decoder.layers[start:stop], of.layers[start:stop], strict=True):
        _set_projections(to.self_attn, [layer.self_attn], "kv")
    between = Between(common_norm(of.layers, start), of.config.hidden_size, start, stop)
    nn.init.zeros_(between.map.weight)
    nn.init.zeros_(between.map.bias)
    decoder.between_swiftkv = between.to(projection(of.layers[start].self_attn, "k")[0].weight)


def _projection(attention: Any, name: str) -> Any:
    """A copy of an attention's projection to queries, keys or values."""
    module, rows = projection(attention, name)
    if rows == slice(0, module.out_features):
        return copy.deepcopy(module)
    part = nn.Linear(module.in_features, rows.stop - rows.start, bias=module.bias is not None, device="meta")
    for name, parameter in module.named_parameters():
        setattr(part, name, nn.Parameter(parameter[rows].clone(), requires_grad=parameter.requires_grad))
    return part


def _mean(modules: list[Any]) -> Any:
    """A copy of the first module whose parameters are the mean of all."""
    mean = copy.deepcopy(modules[0])
    # a single one keeps its weights, bit for bit
    if len(modules) > 1:
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([module.get_parameter(name).double() for module in modules]).mean(0))
    return mean
