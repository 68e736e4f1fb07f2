"""A tiny model with random weights and the architecture of a large one, for runs of seconds and without a download."""

import copy
import math
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvcompress.hf.configs import decoder_config, head_counts, latent_rank, shared_layers, sizes

# makes attention peaked, so that faults show, and logits as large as a trained model's
_SPREAD = 1.2
_WIDEST = 512
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
    small = copy.deepcopy(config)
    if config.get_text_config(decoder=True) is not config:
        return _small_multimodal(small)
    layers, lists = layers_of_each_kind(config)
    heads, kv_heads, head_dim = head_counts(config)
    group = min(max(1, heads // kv_heads), 16)
    if not hasattr(config, "head_dim"):
        # hidden size is then heads * head_dim
        while group > 1 and 2 * group * head_dim > _WIDEST:
            group //= 2
    kv_heads = min(kv_heads, 1 if group > 8 else 2)
    heads = kv_heads * group

    take_layers(small, layers, lists)
    small.num_attention_heads = heads
    if hasattr(small, "num_key_value_heads"):
        # heads that share latents each have keys and values of their own
        small.num_key_value_heads = kv_heads if latent_rank(config) is None else heads
    small.hidden_size = heads * 16
    if getattr(small, "head_dim", head_dim) is None:
        small.head_dim = head_dim
    if head_counts(small)[2] != head_dim:
        small.hidden_size = heads * head_dim
    hidden = small.hidden_size
    if hasattr(small, "word_embed_proj_dim"):
        small.word_embed_proj_dim = hidden
    for name, most in {
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
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32,
        "sliding_window": 64,
        "attention_chunk_size": 64,
    }.items():
        size = getattr(small, name, None)
        if isinstance(size, list):
            setattr(small, name, [min(part, most) for part in size])
        elif isinstance(size, int):
            setattr(small, name, min(size, most))
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


def layers_of_each_kind(config: PreTrainedConfig) -> tuple[list[int], dict[str, list[Any]]]:
    """The first four layers, or as many more as it takes to have each kind; and a config's settings that have a value
    per layer, by name."""
    count = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    own = count - shared_layers(config)
    kinds = [str([layer >= own, *(value[layer] for value in lists.values())]) for layer in range(count)]
    firsts = sorted(kinds.index(kind) for kind in set(kinds))
    if firsts[-1] < 8:
        return list(range(min(count, max(4, firsts[-1] + 1)))), lists
    # if a kind comes late: the first layer of each kind, and the one before it
    return sorted({0, 1, *firsts, *(max(0, first - 1) for first in firsts)}), lists


def take_layers(config: PreTrainedConfig, layers: list[int], lists: dict[str, list[Any]]) -> None:
    """Leaves a config only these of its layers, where `lists` has its settings that have a value per layer."""
    own = config.num_hidden_layers - shared_layers(config)
    for name, value in lists.items():
        setattr(config, name, [value[layer] for layer in layers])
    if shared_layers(config):
        config.num_kv_shared_layers = sum(layer >= own for layer in layers)
    config.num_hidden_layers = len(layers)
