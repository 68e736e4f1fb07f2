"""SwiftKV: a prefill that really skips the later layers, and AcrossKV: layers that share storage (arXiv:2410.03960).

    model = convert(model, skip_from=0.5)           # the second half of the layers is skipped by the prompt
    model.generate(**inputs)                        # any cache; SwiftKVCache(model) where groups share storage

A converted model has its own class (LlamaSwiftKVForCausalLM, ...) on top of transformers' class of that family, with
the weights of the original model, which is not changed. No class is patched. It differs in two places: its later
decoder layers (kvcompress/swiftkv/forward.py), and a forward that tells them which positions are asked for. Everything
else (masks, caches, rotary embeddings, generate) is transformers' code. Importing this module registers the classes
with AutoConfig and AutoModelForCausalLM, so that checkpoints in the layout published with the paper load with
`AutoModelForCausalLM.from_pretrained`: config fields num_key_value_layers and key_value_group_size, tensors
norm_swiftkv and {q,k,v}_proj_swiftkv.

The positions that run the later layers are those of `logits_to_keep`; if a row ends in padding, the last real tokens
before it (transformers would give the logits of the padding). A call for all logits, labels, hidden states or
attentions runs all positions, with the same numbers. A conversion changes what the model computes: it needs the
distillation of kvcompress/swiftkv/distill.py before it is useful, or at least a fit (least_squares.py).

With `own_last` the last tokens of a prompt run the later layers too, and every token that runs them has its own
queries, keys and values, by the projections that the model had before: keys and values of the common input stand in for
them only where they were not computed. This is not in the paper, costs a projection for each such token, and loses much
less. What a token is given then depends on which positions ran: a call for all logits computes what the model did
before.

With `skip_between` those that do not run the later layers skip a span of layers before them, too: some of the layers
behind it matter more.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvcompress import hf
from kvcompress.hf.families import FAMILIES, Family
from kvcompress.swiftkv.forward import Between, SingleInput, SingleInputAttention, SingleInputLayer, last_columns

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


@dataclass(init=False, repr=False, eq=False)
class _Config:
    """The config fields of a converted model.

    num_key_value_layers: layers before the later ones. key_value_group_size: later layers that share keys and values.
    swiftkv: False starts the model as its own teacher. swiftkv_teacher: it also has the teacher's projections.
    swiftkv_own_last: as many tokens up to the first whose logits are wanted, at least, run the later layers, and all
    that do have their own queries, keys and values; 0: no token has. swiftkv_skip_between: the first layer of a span
    that tokens without their own skip before the later ones, and the layer at which they go on; None: they skip none.
    """

    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    swiftkv: bool = True
    swiftkv_teacher: bool = False
    swiftkv_own_last: int = 0
    swiftkv_skip_between: list[int] | tuple[int, int] | None = None
    base_model_tp_plan: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the later layers' projections are split like the family's own
        plan = dict(cls.base_model_tp_plan or {})
        later = {f"{rule}_swiftkv": how for rule, how in plan.items() if rule.rpartition(".")[2] in _PROJECTIONS}
        cls.base_model_tp_plan = plan | later

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.num_key_value_layers is None:
            self.num_key_value_layers = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.key_value_group_size is None:
            self.key_value_group_size = 1
        _check_split(self, self.num_key_value_layers, self.key_value_group_size)
        _check_own(self)
        if self.swiftkv_skip_between is not None:
            _check_between(self)
            # as files have it
            self.swiftkv_skip_between = [*self.swiftkv_skip_between]


class _Decoder(nn.Module):
    """The decoder of a converted model, on top of its family's."""

    config: Any
    layers: nn.ModuleList
    norm: Any
    # of the span that is skipped before the later layers, if one is
    between_swiftkv: Between | None
    post_init: Any
    later: tuple[Any, Any]
    # False: the teacher
    single_input = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.single_input = config.swiftkv or not config.swiftkv_teacher
        layer_kind, attention_kind = self.later
        layers: Any = self.layers
        between = config.swiftkv_skip_between
        for index in (*range(*between or (0, 0)), *range(config.num_key_value_layers, config.num_hidden_layers)):
            layer: Any = layer_kind(config, index)
            layer.self_attn = attention_kind(config, index)
            layers[index] = layer
            within = (index - config.num_key_value_layers) % config.key_value_group_size
            if within:
                layer.self_attn.follow(layers[index - within].self_attn)
        self.norm_swiftkv = common_norm(layers, config.num_key_value_layers)
        self.between_swiftkv = between and Between(common_norm(layers, between[0]), config.hidden_size, *between)
        # modules that device_map and FSDP must not split
        self._no_split_modules: Any = {*self._no_split_modules, layer_kind.__name__}
        self.post_init()

    def forward(self, *args: Any, asked: Tensor | None = None, **kwargs: Any) -> Any:
        """The family's forward; `asked` [batch, positions] int64 are the columns wanted, None for all."""
        config = self.config
        if not self.single_input:
            return super().forward(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        visible = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        first, share = config.num_key_value_layers, config.key_value_group_size
        # if hidden states or attentions are asked for, every position runs every layer
        wants_all = any(
            kwargs.get(name, getattr(config, name, None)) for name in ("output_hidden_states", "output_attentions")
        )
        leaders: Any = [layer.self_attn for layer in self.layers[first::share]]
        # checkpointed layers run without a cache, and warn of it
        checkpointed = self.training and getattr(self, "gradient_checkpointing", False)
        given = None if checkpointed else hf.cache_in((*args, *kwargs.values()))
        own_last = config.swiftkv_own_last
        wanted = None if wants_all else asked
        between, span = self.between_swiftkv, None
        if between is not None:
            skipped: Any = [layer.self_attn for layer in self.layers[between.start : between.stop]]
            span = SingleInput(between.norm, skipped, between.start, 1, wanted, visible, given, own_last, between)
        state = SingleInput(self.norm_swiftkv, leaders, first, share, wanted, visible, given, own_last, between=span)
        output = super().forward(*args, single_input=state, **kwargs)
        if leaders and not checkpointed:
            # the decoder may have created one itself
            state.check_reached(hf.cache_of(output), state.cache)
        if asked is not None:
            state.asked = asked
            output.last_hidden_state = state.answer(output.last_hidden_state)
        return output


class SwiftKVModel(nn.Module):
    """What converted models have in common, in addition to their family's ForCausalLM class."""

    config: Any
    model: _Decoder
    kind_of_decoder: type[_Decoder]
    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = [
        r"layers\.\d+\.self_attn\.(qkv_proj|[qkv]_(proj|norm))\.(weight|bias)$"
    ]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.kind_of_decoder(config)
        self.post_init()  # type: ignore[operator]

    @property
    def single_input(self) -> bool:
        """True if the later layers take the common input; False if the model is its own teacher."""
        return self.model.single_input

    @single_input.setter
    def single_input(self, value: bool) -> None:
        if not value and not self.config.swiftkv_teacher:
            raise ValueError(
                f"this {type(self).__name__} was published without the teacher's query, key and value projections"
            )
        self.model.single_input = value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # on top of the family's class, which is next in the method resolution order
        family: Any = cls.__mro__[cls.__mro__.index(SwiftKVModel) + 1]
        cls.forward = _narrowing(family.forward)


def _narrowing(family: Callable[..., Any]) -> Callable[..., Any]:
    """A family's forward, in which prompts stop at the first later layer unless all logits are asked for."""
    names = list(inspect.signature(family).parameters)[1:]

    @functools.wraps(family)
    def forward(self: SwiftKVModel, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        fed = given.get("input_ids")
        fed = given.get("inputs_embeds") if fed is None else fed
        if self.single_input and given.get("labels") is None and fed is not None:
            asked = _asked(
                given.get("logits_to_keep", 0), given.get("attention_mask"), fed.shape[0], fed.shape[1], fed.device
            )
            if asked is not None:
                given |= {"logits_to_keep": 0, "asked": asked}
        return family(self, **given)

    return forward


def _classes(family: Family) -> dict[str, type]:
    """The classes of a converted model, on top of those of its family, by name."""

    def made(kind: str, *bases: type, **members: Any) -> Any:
        name = f"{family.name}SwiftKV{kind}"
        return type(name, bases, {"__module__": __name__, "__qualname__": name, **members})

    model_type = f"{family.config.model_type.removesuffix('_text')}_swiftkv"
    config = made("Config", _Config, family.config, model_type=model_type)
    attention = made(
        "Attention", SingleInputAttention, family.attention,
        rotate=staticmethod(family.rotate), eager=staticmethod(family.eager), softcap=family.softcap,
    )  # fmt: skip
    layer = made("DecoderLayer", SingleInputLayer, family.layer)
    decoder = made("Model", _Decoder, family.decoder, config_class=config, later=(layer, attention))
    causal = made("ForCausalLM", SwiftKVModel, family.causal, config_class=config, kind_of_decoder=decoder)
    return {kind.__name__: kind for kind in (config, attention, layer, decoder, causal)}


# LlamaSwiftKVForCausalLM and the others; a pickled model finds them in this module
for _family in FAMILIES:
    globals().update(_classes(_family))

CONVERTED: dict[type[PreTrainedModel], Any] = {
    family.causal: globals()[f"{family.name}SwiftKVForCausalLM"] for family in FAMILIES
}

for _kind in CONVERTED.values():
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)


def common_norm(layers: Any, first: int) -> nn.Module:
    """The norm with which the later layers' common one begins: a copy of the input norm of the first, if it has one."""
    norm = getattr(layers[min(first, len(layers) - 1)], "input_layernorm", None)
    return nn.Identity() if norm is None else copy.deepcopy(norm)


@contextmanager
def as_teacher(model: SwiftKVModel) -> Iterator[None]:
    """Within it, the model computes what it computed before it was converted."""
    before, model.single_input = model.single_input, False
    try:
        yield
    finally:
        model.single_input = before


@contextmanager
def all_fitted(model: SwiftKVModel) -> Iterator[None]:
    """Within it, no token has keys and values of its own in the later layers: what distillation trains.

    Raises:
        ValueError: prompts skip a span before the later layers, which tokens that have their own do not.
    """
    config = model.config
    if config.swiftkv_skip_between is not None:
        raise ValueError(
            f"distillation trains no conversion with skip_between={tuple(config.swiftkv_skip_between)}; "
            "fit(model, rows) fits it"
        )
    before, config.swiftkv_own_last = config.swiftkv_own_last, 0
    try:
        yield
    finally:
        config.swiftkv_own_last = before


class _Known(nn.Module):
    """Replaces a layer whose output does not matter, or is known. output: None for its input."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.output is None else self.output


@contextmanager
def entered_at(model: Any, first: int, hidden: Tensor, stop: int | None = None) -> Iterator[None]:
    """Within it, the layers before `first` of a model, converted or not, do not run: that one takes `hidden`
    [batch, tokens, hidden_size]. After the last layer, what was the decoder's output before its norm. Nor do those from
    `stop` on."""
    layers: Any = model.model.layers
    stop = len(layers) if stop is None else stop
    unread = (_Known(None) for _ in layers[stop:])
    model.model.layers = nn.ModuleList([*(_Known(hidden) for _ in range(first)), *layers[first:stop], *unread])
    try:
        yield
    finally:
        model.model.layers = layers


def check_has_teacher(model: Any) -> None:
    """
    Raises:
        ValueError: the model was not converted, or published without its teacher.
    """
    if not isinstance(model, SwiftKVModel):
        raise ValueError(f"a converted model is needed, of kvcompress.convert; got {type(model).__name__}")
    if not model.config.swiftkv_teacher:
        raise ValueError(f"this {type(model).__name__} was published without its teacher; convert the base model")


def set_own_last(model: SwiftKVModel, own_last: int) -> None:
    """Has a converted model's prompts run the later layers for so many of their last tokens, as `convert` does.

    Raises:
        ValueError: as `convert`, of own_last; the model is unchanged.
    """
    config = model.config
    before, config.swiftkv_own_last = config.swiftkv_own_last, own_last
    try:
        _check_own(config)
    except ValueError:
        config.swiftkv_own_last = before
        raise


def trained_parameters(model: SwiftKVModel) -> dict[str, nn.Parameter]:
    """What a conversion adds and distillation trains, by name: the common norm and the later layers' q, k and v; and
    what stands in for a span."""
    return {name: parameter for name, parameter in model.named_parameters() if "_swiftkv." in name}


def _check_split(config: Any, first: int, share: int) -> None:
    layers = config.num_hidden_layers
    if not 1 <= first <= layers:
        raise ValueError(f"num_key_value_layers must be from 1 to {layers}, got {first}")
    if share < 1 or (layers - first) % share:
        raise ValueError(
            f"share must divide the {layers - first} later layers (of {layers}, from layer {first}), got {share}"
        )
    types = [_kind_of_attention(config, layer) for layer in range(layers)]
    for start in range(first, layers, share):
        kinds = sorted(set(types[start : start + share]))
        if len(kinds) > 1:
            raise ValueError(
                f"layers {start} to {start + share - 1} would share keys and values, but are of types {kinds}; "
                "choose skip_from and share so that a group has one type"
            )


def _check_own(config: Any) -> None:
    own = config.swiftkv_own_last
    if not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise ValueError(f"own_last must be a number of tokens, 0 or more, got {own!r}")
    if own and config.key_value_group_size > 1:
        raise ValueError(
            f"own_last={own} gives each layer keys and values of its own, which share={config.key_value_group_size} "
            "layers cannot have in common: use one or the other"
        )
    if own and not config.swiftkv_teacher:
        raise ValueError(
            f"own_last={own} needs the model's own projections, which this checkpoint was published without"
        )


def _check_between(config: Any) -> None:
    between, first = config.swiftkv_skip_between, config.num_key_value_layers
    whole = isinstance(between, list | tuple) and len(between) == 2
    whole = whole and all(isinstance(each, int) and not isinstance(each, bool) for each in between)
    if not whole or not 1 <= between[0] < between[1] < first:
        raise ValueError(
            f"skip_between must be the first layer of a span and the layer behind it, from 1 to {first - 1} as prompts "
            f"skip all from {first} on, got {between!r}"
        )
    if not config.swiftkv_own_last:
        raise ValueError(
            f"skip_between={tuple(between)} is for the tokens of a prompt that are not its last: it needs own_last"
        )


def _kind_of_attention(config: Any, layer: int) -> str:
    """How a layer attends, in words; layers that differ in it cannot share keys."""
    kind = hf.layer_kind(config, layer) or "full_attention"
    rotates = (getattr(config, "no_rope_layers", None) or [1] * (layer + 1))[layer]
    return kind if rotates else f"{kind} without RoPE"


def _asked(logits_to_keep: int | Tensor, mask: Any, batch: int, columns: int, device: torch.device) -> Tensor | None:
    """The columns whose logits are wanted, [batch, positions] int64; None for all of them."""
    if columns == 1:
        return None
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype == torch.bool or not logits_to_keep.numel():
            return None
        kept = logits_to_keep.to(device, torch.int64)
        kept = kept.expand(batch, -1) if kept.dim() < 2 else kept
        return torch.where(kept < 0, kept + columns, kept)
    if not 0 < logits_to_keep < columns:
        return None
    return last_columns(logits_to_keep, mask, batch, columns, device)
