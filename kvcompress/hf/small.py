"""A tiny model with random weights and the architecture of a large one, for runs of seconds and without a download."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvcompress.hf.configs import (
    decoder_config,
    differing,
    head_counts,
    latent_rank,
    layer_heads,
    shared_layers,
    sizes,
)

# makes attention peaked, so that faults show, and logits as large as a trained model's
_SPREAD = 1.2
_WIDEST = 512
# settings that are numbers of layers, and not values by layer
_OF_INDICES = {"moe_layers"}
# by layer, the one whose keys and values it attends to, often its own
_SOURCES = "kv_source_layers"
# what configs of towers call their numbers of layers
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "layers")


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A `random_model` of `small_config`."""
    return random_model(small_config(config))


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in float32 with random weights, and biases and norms that are not trivial."""
    kind: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    model = kind.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * _SPREAD / math.sqrt(sizes(decoder_config(model)).hidden))
            else:
                parameter.add_(noise * (1.0 if "sinks" in name else 0.1))
    model.generation_config.eos_token_id = None
    found: PreTrainedModel = model.eval()
    return found


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with fewer and narrower layers, otherwise like this one: the same kinds of layers, head_dim, query heads
    per KV head (fewer if it would get wide), rotary embeddings, biases and softcaps; windows of at most 64 tokens."""
    if config.get_text_config(decoder=True) is not config:
        return _small_multimodal(copy.deepcopy(config))
    small = with_layers(config, layers_of_each_kind(config))
    own = [settings for _, settings in sorted(_own_settings(small).items())]
    every = layer_heads(small)
    groups = [min(max(1, each.heads // each.kv_heads), 16) for each in every]
    head_dim, group = every[0].head_dim, max(groups)
    if own:
        # what is set from here on is of all layers
        small.per_layer_config = None
    if not hasattr(small, "head_dim"):
        # hidden size is then heads * head_dim
        while group > 1 and 2 * group * head_dim > _WIDEST:
            group //= 2
        groups = [min(each, group) for each in groups]
    heads = min(every[0].kv_heads, 1 if group > 8 else 2) * group
    of_all = head_counts(small)
    # of a layer's group of its own, the nearest number that divides the heads
    kv_heads, *kv_heads_of = (math.gcd(heads, heads // each) for each in (min(of_all[0] // of_all[1], group), *groups))

    small.num_attention_heads = heads
    if hasattr(small, "num_key_value_heads"):
        # heads that share latents each have keys and values of their own
        small.num_key_value_heads = kv_heads if latent_rank(config) is None else heads
    if getattr(small, "num_attention_heads_per_layer", None):
        small.num_attention_heads_per_layer = [kv_heads * each for each in groups]
    if hasattr(small, "swa_num_attention_heads"):
        # a kind of layer with heads of its own
        own_group = max(1, min(small.swa_num_attention_heads // small.swa_num_key_value_heads, heads))
        small.swa_num_attention_heads, small.swa_num_key_value_heads = heads, math.gcd(heads, heads // own_group)
    small.hidden_size = heads * 16
    if getattr(small, "head_dim", head_dim) is None:
        small.head_dim = head_dim
    if layer_heads(small)[0].head_dim != head_dim:
        small.hidden_size = heads * head_dim
    hidden = small.hidden_size
    if hasattr(small, "word_embed_proj_dim"):
        small.word_embed_proj_dim = hidden
    limits = {
        "intermediate_size": 2 * hidden,
        "ffn_dim": 2 * hidden,
        "moe_intermediate_size": hidden,
        "shared_expert_intermediate_size": hidden,
        "intermediate_size_mlp": 2 * hidden,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_heads": 4,
        "linear_head_dim": 32,
        "n_group": 2,
        "topk_group": 1,
        "vocab_size": 512,
        "unpadded_vocab_size": 512,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32,
        "sliding_window": 64,
        "attention_chunk_size": 64,
        "index_topk": 64,
    }
    for name, most in limits.items():
        size = getattr(small, name, None)
        if isinstance(size, list):
            setattr(small, name, [min(part, most) for part in size])
        elif isinstance(size, int):
            setattr(small, name, min(size, most))
    if own:
        for layer, settings in enumerate(own):
            has = {"num_key_value_heads": kv_heads_of[layer]} if "num_key_value_heads" in settings else {}
            if latent_rank(config) is not None and has:
                # heads that share latents each have keys and values of their own
                has = {"num_key_value_heads": heads}
                settings["num_attention_heads"] = heads
            elif "num_attention_heads" in settings:
                has["num_attention_heads"] = has.get("num_key_value_heads", kv_heads) * groups[layer]
            has |= {name: min(settings[name], most) for name, most in limits.items() if name in settings}
            settings.update(has)
        small.per_layer_config = dict(enumerate(own))
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        known = getattr(small, name, None)
        if known is not None and (not isinstance(known, int) or known >= small.vocab_size):
            setattr(small, name, token)
    vars(small).pop("quantization_config", None)
    return small


def _small_multimodal(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a multimodal model with a small decoder, and towers of one layer."""
    text = config.get_text_config(decoder=True)
    small = small_config(text)
    parts = [config]
    while parts:
        part = parts.pop()
        for name in part.sub_configs:
            held = getattr(part, name, None)
            if held is text:
                setattr(part, name, small)
            elif isinstance(held, PreTrainedConfig):
                parts.append(held)
        for name in _DEPTHS:
            if part is not config and isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
        if hasattr(part, "out_hidden_size"):
            part.out_hidden_size = small.hidden_size
    return config


def described(model: PreTrainedModel) -> str:
    """A model's type and shape on one line."""
    config = decoder_config(model)
    shape = sizes(config)
    kinds = getattr(config, "layer_types", None) or []
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    parts = [
        f"{shape.layers} layers" + (f" ({counted})" if len(set(kinds)) > 1 else ""),
        f"hidden size {shape.hidden}",
        f"{shape.heads} query heads and {shape.kv_heads} KV heads of {shape.head_dim}",
        *([f"window {window}"] if window else []),
        f"vocabulary {shape.vocabulary}",
        str(model.dtype).removeprefix("torch."),
    ]
    return f"{config.model_type} ({type(model).__name__}), {', '.join(parts)}"


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of a config that has only these of its layers."""
    few, own = copy.deepcopy(config), _own_settings(config)
    if own:
        few.per_layer_config = None
    for name, value in _values_by_layer(config).items():
        setattr(few, name, [value[layer] for layer in layers])
    for name in _OF_INDICES & {*vars(config)}:
        chosen = getattr(config, name) or ()
        setattr(few, name, [index for index, layer in enumerate(layers) if layer in chosen])
    if shared_layers(config):
        first_shared = config.num_hidden_layers - shared_layers(config)
        few.num_kv_shared_layers = sum(layer >= first_shared for layer in layers)
    few.num_hidden_layers = len(layers)
    sources = getattr(config, _SOURCES, None)
    if sources:
        kept = {layer: index for index, layer in enumerate(layers)}
        setattr(few, _SOURCES, [kept.get(sources[layer], index) for index, layer in enumerate(layers)])
    if own:
        few.per_layer_config = {index: own[layer] for index, layer in enumerate(layers)}
    return few


def _own_settings(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What only the config of a layer has, by layer; empty where layers do not differ."""
    names = differing(config)
    if not names:
        return {}
    return {index: {name: getattr(own, name) for name in names} for index, own in enumerate(config.per_layer_config)}


def _values_by_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """A config's settings that have a value per layer, by name."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name not in {*_OF_INDICES, _SOURCES}
    }


def layers_of_each_kind(config: PreTrainedConfig) -> list[int]:
    """The first four layers, or as many more as it takes to have each kind."""
    count, lists = config.num_hidden_layers, _values_by_layer(config)
    own, first_shared = _own_settings(config), count - shared_layers(config)
    sources = getattr(config, _SOURCES, None)
    chosen = [getattr(config, name) or () for name in sorted(_OF_INDICES & {*vars(config)})]
    kinds = [
        str(
            [
                layer >= first_shared,
                sources is not None and sources[layer] != layer,
                *(value[layer] for value in lists.values()),
                own.get(layer),
                *(layer in some for some in chosen),
            ]
        )
        for layer in range(count)
    ]
    firsts = sorted(kinds.index(kind) for kind in set(kinds))
    if firsts[-1] < 8:
        return list(range(min(count, max(4, firsts[-1] + 1))))
    # if a kind comes late: the first layer of each kind, and the one before it
    return sorted({0, 1, *firsts, *(max(0, first - 1) for first in firsts)})
