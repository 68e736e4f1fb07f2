"""What a model's config says: whether the model is supported, its sizes, and the window of each layer."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


@dataclass(frozen=True)
class LayerKind:
    """What a layer keeps of what it has seen.

    attends: keys and values of tokens. window: of how many tokens, None for all. states: how many states of a linear
    attention, a state space or a convolution, whose size does not depend on the number of tokens. kv_source: the layer
    to whose keys and values it attends, as it keeps none; None for no such layer. is_chunked: the text is cut into
    chunks of `window` tokens, and a token sees none of an earlier chunk. is_indexed: an indexer, its own or an earlier
    layer's, chooses which tokens are attended to.
    """

    attends: bool
    window: int | None = None
    states: int = 0
    kv_source: int | None = None
    is_chunked: bool = False
    is_indexed: bool = False


# layers with an indexer; and their names before transformers 5.24, which gave caches keys and values made of latents
_INDEXED = ("indexed_attention",)
_INDEXED_BEFORE = ("deepseek_sparse_attention", "qwen_sparse_attention")
# for each type of transformers, whether it attends, and whether it has states; the last two have neither
_KINDS = {
    "full_attention": (True, False),
    "sliding_attention": (True, False),
    "chunked_attention": (True, False),
    **dict.fromkeys(_INDEXED, (True, False)),
    "linear_attention": (False, True),
    "conv": (False, True),
    "hybrid": (True, True),
    "hybrid_sliding": (True, True),
    "moe": (False, False),
    "mlp": (False, False),
}


# types that are encoders unless they are told to be decoders: transformers knows all but the last as masked language
# models, among which is also Reformer, whose released models decode
_ENCODERS = {
    *({*MODEL_FOR_MASKED_LM_MAPPING_NAMES} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}) - {"reformer"},
    "bert-generation",
}
# further types that transformers lists with those that generate text, but which are no decoder-only language models: a
# drafter of another model, one that moves a robot, the decoder of an encoder-decoder, one that permutes its tokens
_PARTS = {"gemma4_assistant", "gemma4_unified_assistant", "pi0", "trocr", "xlnet"}
# types that keep a state of fixed size in place of keys and values
_WITHOUT_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
# types whose attention is of their own, and what it does
_OWN_WAYS = {
    "blt": "reads bytes and patches with several decoders, which share two caches",
    "diffllama": "attends twice to the keys of a layer, with values of other heads",
    "diffusion_gemma": "lets the tokens of a block attend both ways",
    "doge": "adds a bias to its attention that depends on the values of all tokens",
    "dory": "runs its layers several times for a token, and lengthens its cache for that",
    "evolla": "attends to proteins in layers of their own",
    "gemma4_assistant": "attends to the keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "attends to the keys and values of the model that it drafts for",
    "git": "computes its attention by itself",
    "idefics": "attends to images in layers of their own",
    "kosmos_2_5_text_model": "takes positions of its own",
    "kosmos_2_text_model": "takes positions of its own",
    "kyutai_speech_to_text": "reads the codes of a sound with each token",
    "mllama": "attends to images in layers of their own",
    "mllama_text_model": "attends to images in layers of their own",
    "pi0": "moves a robot, and generates no tokens",
    "qwen2_5_omni": "is several models with a cache each (its `thinker` is one)",
    "qwen3_omni_moe": "is several models with a cache each (its `thinker` is one)",
    "recurrent_gemma": "keeps states in the model, and not in its cache",
    "reformer": "attends by hashes to hidden states, which it keeps in place of keys and values",
    "voxtral_realtime": "reads a piece of a sound with each token",
}


# numbers of a vector up to which kernels pack it
_WIDEST_PACKED = 256

# what configs call heads; those of some sliding layers with "swa_" before it
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
# types whose sliding layers have more KV heads than their config says, and how many times as many
_MORE_KV_HEADS = {"mimo_v2_flash": 2}


class LayerHeads(NamedTuple):
    """The heads of a layer: of queries, of keys and values, and the width of keys and of values; and that of the one
    key by which the layer's indexer scores a token, 0 for no indexer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    index_dim: int = 0

    @property
    def key_width(self) -> int:
        """Numbers of a token's keys."""
        return self.kv_heads * self.head_dim

    @property
    def token(self) -> int:
        """Numbers of a token's keys and values, and of its index key."""
        return self.kv_heads * (self.head_dim + self.value_dim) + self.index_dim

    @property
    def packed(self) -> "LayerHeads":
        """These as GEAR packs them: latents in parts, of which half are values; ValueError as `latent_part`."""
        if self.value_dim:
            return self
        width = part_of(self.head_dim)
        return self._replace(kv_heads=self.head_dim // (2 * width), head_dim=width, value_dim=width)

    @property
    def mean_dim(self) -> int:
        """Half of what a head's key and value have together."""
        return (self.head_dim + self.value_dim) // 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder. longest: tokens it was trained for, None if the config does not say.

    heads, kv_heads, head_dim: of the first layer; `layer_heads` has those of each.
    learned_positions: positions come from a table, which ends at `longest`.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    longest: int | None
    learned_positions: bool


def sizes(config: PreTrainedConfig) -> Sizes:
    """The sizes in a decoder's config."""
    first = layer_configs(config)[0]
    heads, kv_heads, head_dim = head_counts(first)
    hidden = config.hidden_size
    widths = getattr(first, "intermediate_size", None) or getattr(first, "ffn_dim", None) or 4 * hidden
    return Sizes(
        config.num_hidden_layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        max(widths) if isinstance(widths, list) else widths,
        config.vocab_size,
        trained_length(config),
        getattr(config, "rope_parameters", None) is None,
    )


def trained_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a decoder was trained for, None if its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def head_counts(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim of what layers give their cache; of a config whose layers are alike, or of one
    layer's."""
    heads = config.num_attention_heads
    rank = latent_rank(config)
    if rank is not None:
        return heads, 1, rank + config.qk_rope_head_dim
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, head_dim


def latent_rank(config: PreTrainedConfig) -> int | None:
    """In multi-head latent attention (2405.04434), the width of the latents that layers give their cache; else None.

    Of a config whose layers differ, it only tells latents from keys and values.
    """
    own = config.per_layer_config[0] if "kv_lora_rank" in differing(config) else config
    rank: int | None = getattr(own, "kv_lora_rank", None)
    return rank


def has_biases(config: PreTrainedConfig) -> bool:
    """Whether layers add biases to their logits that each query makes for itself, by distance."""
    return getattr(config, "rel_extent", None) is not None


def _value_width(config: PreTrainedConfig, head_dim: int) -> int:
    """How many numbers a cache holds of a token's values, in one KV head: none beside latents, which are both."""
    if latent_rank(config) is not None:
        return 0
    return getattr(config, "v_head_dim", None) or head_dim


def is_indexed(config: PreTrainedConfig) -> bool:
    """Whether indexers choose what tokens attend to (DeepSeek Sparse Attention, 2512.02556), in any layer."""
    return any(name in _INDEXED for name in getattr(config, "layer_types", None) or ())


def _index_width(config: PreTrainedConfig, layer: int) -> int:
    """The width of the keys by which a layer's own indexer scores tokens, 0 for no indexer."""
    types = getattr(config, "indexer_types", None)
    if layer_kind(config, layer) not in _INDEXED or (types and types[layer] == "shared"):
        return 0
    return index_width(config)


def index_width(config: PreTrainedConfig) -> int:
    """The width of the keys by which indexers score tokens."""
    if block_of(config) is not None:
        of_blocks: int = config.indexer_head_dim
        return of_blocks
    width: int = config.index_head_dim
    # where pools are scored: also what weighs a token in its pool, and whether it is none of the padding
    return 2 * width + 1 if pool_of(config) is not None else width


def pool_of(config: PreTrainedConfig) -> int | None:
    """How many neighbouring tokens an indexer scores together; None for one at a time."""
    size: int | None = getattr(config, "index_kpool", None)
    return size


def block_of(config: PreTrainedConfig) -> int | None:
    """How many of the tokens that a query may see, one after another, an indexer beside keys and values of many heads
    scores together (Qwen4); None for other indexers."""
    size: int | None = getattr(config, "indexer_compress_ratio", None)
    return size


def layer_configs(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """The config of each layer: the whole one, where layers do not differ."""
    return config.per_layer_config if differing(config) else [config] * config.num_hidden_layers


def latent_ranks(config: PreTrainedConfig) -> list[int | None]:
    """The width of each layer's latents, as `latent_rank`."""
    ranks = [latent_rank(own) for own in layer_configs(config)]
    return [ranks[index] for index in filling_layers(config)]


def layer_heads(config: PreTrainedConfig) -> list[LayerHeads]:
    """The heads of each layer, whether it attends or not."""
    of_queries = getattr(config, "num_attention_heads_per_layer", None)
    with_positions = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    found = []
    for index, own in enumerate(layer_configs(config)):
        heads, kv_heads, head_dim = head_counts(own)
        if layer_kind(config, index) == "hybrid_sliding":
            heads, kv_heads, head_dim = (
                getattr(own, f"swa_{name}", size)
                for name, size in zip(_HEADS, (heads, kv_heads, head_dim), strict=True)
            )
        if of_queries:
            heads = of_queries[index]
        if latent_rank(own) is not None and not with_positions[index]:
            # nothing is shared of keys but the latents
            head_dim -= own.qk_rope_head_dim
        if layer_kind(config, index) == "sliding_attention":
            kv_heads *= _MORE_KV_HEADS.get(config.model_type, 1)
        found.append(LayerHeads(heads, kv_heads, head_dim, _value_width(own, head_dim), _index_width(config, index)))
    return [found[index] for index in filling_layers(config)]


def filling_layers(config: PreTrainedConfig) -> list[int]:
    """For each layer of a cache, which layer of the model fills it: those that a model runs several times (Inkling 2
    Loop) fill further ones after all others."""
    layers = [*range(config.num_hidden_layers)]
    start, end = _looped(config)
    return layers + layers[start:end] * (getattr(config, "loop_num_passes", 1) - 1)


def run_order(config: PreTrainedConfig) -> list[int]:
    """The layers of a cache in the order in which a forward fills them."""
    count, (_, end) = config.num_hidden_layers, _looped(config)
    return [*range(end), *range(count, len(filling_layers(config))), *range(end, count)]


def _looped(config: PreTrainedConfig) -> tuple[int, int]:
    """The first layer that a model runs several times, and the next one that it does not."""
    return getattr(config, "loop_layer_index_start", 0), getattr(config, "loop_layer_index_end", 0)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The decoder's config, if kvcompress supports the model.

    Raises:
        TypeError: it is no model, but perhaps its config or its name.
        ValueError: the model has something that kvcompress does not support; the message names it.
    """
    if not hasattr(model, "config"):
        raise TypeError(f"a cache is built for a loaded model, got {type(model).__name__}: pass the model itself")
    config = model.config
    name = type(model).__name__
    check_served(config, name)
    return decoder_config(model)


def decoder_config(module: Any) -> PreTrainedConfig:
    """The config of a module's decoder: its own, or in a multimodal model that of the text."""
    config: PreTrainedConfig = module.config.get_text_config(decoder=True)
    return config


def as_decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, which tells a type that is an encoder otherwise to be a decoder."""
    if config.model_type in _ENCODERS and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether layers choose experts for each token."""
    names = "num_local_experts", "num_experts"
    return any((getattr(own, name, None) or 0) > 1 for own in layer_configs(config) for name in names)


def model_types() -> dict[str, str]:
    """The kind of each type that the installed transformers lists with those that generate text, without
    encoder-decoders, as far as its config's class says.

    Returns:
        "text" or "multimodal": decoder-only language models; "states": those without keys and values; "other": encoders
        that can be told to decode, and parts of other models.
    """
    text, mixed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    kinds = dict.fromkeys(text, "text") | dict.fromkeys(mixed, "multimodal")
    kinds |= dict.fromkeys(_WITHOUT_ATTENTION, "states") | dict.fromkeys(_ENCODERS | _PARTS, "other")
    return {
        name: kinds[name]
        for name in sorted({*text, *mixed})
        if name in CONFIG_MAPPING and getattr(CONFIG_MAPPING[name], "is_encoder_decoder", False) is not True
    }


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether a model puts what it sees or hears among the tokens of a text decoder, which it contains."""
    return decoder_config(model) is not model.config


def takes_one_mask(model: PreTrainedModel) -> bool:
    """Whether a model with several kinds of layers makes a mask for each by itself, and takes none that `generate` has
    made, as it does for a cache whose steps it may compile."""
    kinds = getattr(decoder_config(model), "layer_types", None) or []
    return model.config.model_type == "paligemma" and len(set(kinds)) > 1


def check_served(config: PreTrainedConfig, name: str) -> None:
    """
    Raises:
        ValueError: the config has something that kvcompress does not support; the message names it.
    """
    if config.model_type in _OWN_WAYS:
        raise ValueError(
            f"{name} {_OWN_WAYS[config.model_type]}; kvcompress supports causal attention through transformers' "
            "AttentionInterface to what each layer gives its cache once"
        )
    if config.model_type in _WITHOUT_ATTENTION:
        raise ValueError(_nothing_to_compress(name))
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; kvcompress supports decoder-only models")
    if config.model_type in _ENCODERS and not getattr(config, "is_decoder", True):
        raise ValueError(
            f"{name} is an encoder (is_decoder=False), whose tokens attend to later ones too; kvcompress supports "
            "decoder-only models"
        )
    if any(kind in _INDEXED_BEFORE for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"{name} chooses what tokens attend to by an indexer, which kvcompress supports from transformers 5.24 on, "
            "where caches are given latents"
        )
    of_latents = latent_rank(config) is not None and getattr(config, "index_topk", None) is not None
    if is_indexed(config) and not of_latents and block_of(config) is None:
        raise ValueError(
            f"{name} chooses what tokens attend to by an indexer of a kind that kvcompress does not know; it supports "
            "indexers of latents, as in DeepSeek-V3.2, and of blocks of tokens beside many heads, as in Qwen4"
        )
    modes = getattr(config, "kv_sharing_modes", None) or []
    if any((mode or "").startswith("reuse") for mode in modes) and not shared_layers(config):
        raise ValueError(
            f"{name} shares keys and values between layers in a way of its own; kvcompress supports models whose last "
            "num_kv_shared_layers layers share those of the last layers of their kinds before them"
        )
    text = config.get_text_config(decoder=True)
    if text is not config:
        check_served(text, name)


def differing(config: PreTrainedConfig) -> list[str]:
    """The settings of a config that differ from layer to layer, and that only the config of a layer has."""
    return sorted(getattr(config, "per_layer_attributes", None) or ())


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind]:
    """What each layer keeps.

    Raises:
        ValueError: a layer is of a type that kvcompress does not support, or none attends; the message names it.
    """
    types, settings = get_layer_types_and_kwargs(config)
    named = getattr(config, "layer_types", None) or types
    own = len(named) - shared_layers(config)
    # transformers 5.17 has one dictionary of settings for all layers, and leaves out those that share another's
    each = [settings] * len(types) if isinstance(settings, dict) else settings
    # GPT-Neo's own names of them
    local = getattr(config, "attention_layers", None)
    kinds: list[LayerKind] = []
    for index, (kind, name) in enumerate(zip([*types, *named[len(types) :]], named, strict=True)):
        if index >= own:
            source = max((earlier for earlier in range(own) if named[earlier] == name), default=None)
            if source is None:
                raise ValueError(
                    f"layer {index} of model type {config.model_type!r} shares the keys and values of an earlier layer "
                    f"of type {name!r}, and there is none"
                )
            kinds.append(LayerKind(False, kinds[source].window, kv_source=source))
            continue
        # a layer that keeps nothing
        if kind == "dummy" and _KINDS.get(name) == (False, False):
            kind = name
        if kind not in _KINDS:
            raise ValueError(
                f"layer {index} of model type {config.model_type!r} is of type {kind!r}; "
                f"kvcompress supports {', '.join(_KINDS)}"
            )
        attends, has_states = _KINDS[kind]
        if local is not None and local[index] == "local":
            kinds.append(LayerKind(True, config.window_size))
            continue
        is_chunked = kind == "chunked_attention"
        window = each[index].get("sliding_window") if "sliding" in kind or is_chunked else None
        states = each[index].get("number_of_states", 1) if has_states else 0
        kinds.append(LayerKind(attends, window, states, is_chunked=is_chunked, is_indexed=kind in _INDEXED))
    if not any(kind.attends for kind in kinds):
        raise ValueError(_nothing_to_compress(f"model type {config.model_type!r}"))
    return [kinds[index] for index in filling_layers(config)]


def _nothing_to_compress(name: str) -> str:
    return (
        f"{name} has no attention whose keys and values could be compressed: it keeps states of a fixed size, which no "
        "token makes larger"
    )


def shared_layers(config: PreTrainedConfig) -> int:
    """How many layers, the last ones, attend to keys and values of earlier layers."""
    return getattr(config, "num_kv_shared_layers", None) or 0


def key_widths(config: PreTrainedConfig) -> dict[int, int]:
    """kv_heads * head_dim of each layer that attends to all tokens, by layer.

    Raises:
        ValueError: as `layer_kinds`.
    """
    kinds, every = layer_kinds(config), layer_heads(config)
    return {
        index: own.key_width
        for index, (kind, own) in enumerate(zip(kinds, every, strict=True))
        if kind.attends and kind.window is None
    }


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window or the chunk of each layer in tokens, None for full attention and layers that do not attend.

    Raises:
        ValueError: as `layer_kinds`.
    """
    return [kind.window for kind in layer_kinds(config)]


def without_windows(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A config by which DynamicCache keeps the tokens that have left a window, the states of a hybrid, and the keys of
    indexers; None, where it needs no config for that."""
    if all_attend(config) and not is_indexed(config):
        return None
    if not any("sliding" in name for name in getattr(config, "layer_types", None) or ()):
        return config
    full = copy.deepcopy(config)
    full.layer_types = [
        name.replace("sliding_attention", "full_attention").removesuffix("_sliding") for name in config.layer_types
    ]
    return full


def latent_part(config: PreTrainedConfig, layer: int) -> int:
    """The width of the parts that a layer's latents are cut into to be packed.

    Raises:
        ValueError: they cannot be cut into parts.
    """
    return part_of(layer_heads(config)[layer].head_dim)


def part_of(head_dim: int) -> int:
    """The same of latents of so many numbers with what keys share."""
    parts = next((n for n in range(2, head_dim, 2) if head_dim % n == 0 and head_dim // n <= _WIDEST_PACKED), None)
    if parts is None:
        raise ValueError(f"latents of {head_dim} numbers with what keys share cannot be cut into parts to pack")
    return head_dim // parts


def packed_widths(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """The head_dims of keys and values that are to be packed, of each kind of layer that attends; ValueError as
    `latent_part`."""
    kinds = layer_kinds(config)
    attending = [index for index, kind in enumerate(kinds) if kind.attends]
    if latent_rank(config) is not None:
        return sorted({(latent_part(config, index),) * 2 for index in attending})
    every = layer_heads(config)
    return sorted({(every[index].head_dim, every[index].value_dim) for index in attending})


def repeats_keys(config: PreTrainedConfig) -> bool:
    """Whether a model gives its attention copies of what it has given its cache: all KV heads, one time after another,
    so that query head h attends to KV head h modulo their number."""
    return config.model_type == "jetmoe"


def shares_kv(config: PreTrainedConfig) -> bool:
    """Whether layers attend to keys and values of others; ValueError as `layer_kinds`."""
    return any(kind.kv_source is not None for kind in layer_kinds(config))


def all_attend(config: PreTrainedConfig) -> bool:
    """Whether every layer keeps keys and values, and nothing else; ValueError as `layer_kinds`."""
    return all(kind.attends and not kind.states for kind in layer_kinds(config))


def layer_kind(config: PreTrainedConfig, layer: int) -> str | None:
    """The type of a layer as the config names it, None if it names none."""
    types = getattr(config, "layer_types", None)
    return types[layer] if types else None


def filler_tokens(model: Any) -> tuple[int | None, list[int]]:
    """The id that `generate` feeds to ended rows, None if it is not known, and the ids that end a row."""
    return fillers_of(getattr(model, "generation_config", None), model.config)


def fillers_of(generation: Any, *further: Any) -> tuple[int | None, list[int]]:
    """The same for one generation, from its generation config; the pad, if that has none, from the first that does."""
    ends = _ends(generation)
    pads = (getattr(settings, "pad_token_id", None) for settings in (generation, *further))
    return next((pad for pad in pads if pad is not None and pad >= 0), ends[0] if ends else None), ends


def end_tokens(model: Any) -> list[int]:
    """The ids that end a model's generation."""
    return _ends(getattr(model, "generation_config", None))


def _ends(generation: Any) -> list[int]:
    ends = getattr(generation, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
