"""Tiny random models, one a family: small enough to run thousands of times, with attention peaked enough to tell."""

import functools
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 512
PAD, END = 0, VOCABULARY - 1
WINDOW = 12

# what every config here shares; a family that calls a size by another name overrides it below
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "attention": "eager",
        "head_dim": 32,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    # the last two layers attend to keys and values of the first two
    "gemma3n": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "head_dim": 32,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "final_logit_softcapping": 30.0,
    },
    # layers of unlike heads: those that see all tokens have wider and fewer ones, or others more queries
    "gemma4": {
        "model_type": "gemma4_text",
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "laguna": {
        "model_type": "laguna",
        "head_dim": 32,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 8, 6],
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **_EXPERTS,
    },
    # values narrower than keys, and more KV heads where the window slides
    "mimo_v2_flash": {
        "model_type": "mimo_v2_flash",
        "attention": "eager",
        "head_dim": 32,
        "v_head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "dense", "dense"],
    },
    # chunks of tokens, and layers without rotation that attend to all
    "llama4": {
        "model_type": "llama4_text",
        # the first release tried whose generate makes a mask of chunks
        "since": "5.24",
        "head_dim": 16,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        # keys of one length would leave policies that rank by it no choice
        "use_qk_norm": False,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "moe_layers": [1],
        "num_experts_per_tok": 1,
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": None},
    # these two know no groups of heads
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": 4, "rotary_pct": 0.5},
    "opt": {
        "model_type": "opt",
        "num_key_value_heads": 4,
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "init_std": 0.2,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **_EXPERTS},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "attention": "eager",
        "head_dim": 32,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **_EXPERTS,
    },
}

# families that only SwiftKV's tests build
CONVERTIBLE: dict[str, dict[str, Any]] = {
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.5,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
}


def build(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of its own, for tests that change it."""
    settings = {**_SIZES, **(FAMILIES | CONVERTIBLE)[family], **changes}
    if Version(transformers.__version__) < Version(settings.pop("since", "0")):
        pytest.skip(f"transformers {transformers.__version__} cannot generate with {family}")
    attention, dtype = settings.pop("attention", "sdpa"), settings.pop("dtype", torch.float32)
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if dtype == torch.float64:
        # torch's grouped products of experts know no float64
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        # what starts at a constant (biases, norms, sinks) would test nothing
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * (1.0 if "sinks" in name else 0.1))
    model.generation_config.eos_token_id = None
    return model.to(DEVICE, dtype).eval()


# of every shared model what it was built as, and those that this test was given
_AS_BUILT: dict[PreTrainedModel, list[Any]] = {}
_LENT: set[PreTrainedModel] = set()


@functools.cache
def _shared(family: str, **changes: Any) -> PreTrainedModel:
    model = build(family, **changes)
    _AS_BUILT[model] = _fingerprint(model)
    return model


def tiny(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model shared between tests; they may build caches for it and change nothing else."""
    model = _shared(family, **changes)
    _LENT.add(model)
    return model


def is_shared(model: PreTrainedModel) -> bool:
    """Whether other tests get this model too."""
    return model in _AS_BUILT


def take_back() -> None:
    """Ends what a test may do with the models that it was given.

    Raises:
        AssertionError: it changed one, which no other test is given then.
    """
    lent = [*_LENT]
    _LENT.clear()
    if any(_fingerprint(model) != _AS_BUILT[model] for model in lent):
        _shared.cache_clear()
        raise AssertionError("a model that tests share was changed; one that changes its model has to build it")


@torch.no_grad()
def _fingerprint(model: PreTrainedModel) -> list[Any]:
    """Weights, settings and hooks of a model; not how it attends, nor the hooks of caches."""
    weights = [(float(each.sum()), each.requires_grad) for each in model.parameters()]
    modules = [
        (each.training, [hook for kind in (each._forward_pre_hooks, each._forward_hooks) for hook in kind.values()])
        for each in model.modules()
    ]
    modules = [(trains, [hook for hook in hooks if not _is_ours(hook)]) for trains, hooks in modules]
    settings = {name: value for name, value in vars(model.config).items() if not name.startswith("_")}
    return [weights, modules, settings, dict(vars(model.generation_config))]


def _is_ours(hook: Any) -> bool:
    return f"{getattr(getattr(hook, 'func', hook), '__module__', '')}".startswith("kvcompress")


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Random tokens, neither PAD nor END, [batch, tokens]; a shorter prompt is the beginning of a longer one.

    No token comes twice in a row, because some policies score two of a kind equal up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCABULARY - 3, generator=generator)[:tokens] + 2 for _ in range(batch)]
    return torch.stack(rows).to(DEVICE)


# HydragenCache serves no chunked attention
IN_NODES = [name for name in FAMILIES if name not in ("gemma3n", "llama4")]


def families(*names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """These families, and some more where slow tests run."""
    more = [pytest.param(name, marks=pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("family", [*names, *more])


def left_padded(rows: list[Tensor], tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [tokens of the row] as one batch: ids and mask, [batch, tokens]."""
    tokens = tokens or max(len(row) for row in rows)
    ids = torch.full((len(rows), tokens), PAD, device=DEVICE)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, tokens - len(row) :] = row
        mask[index, tokens - len(row) :] = 1
    return ids, mask


def places(mask: Tensor) -> Tensor:
    """Position ids as `generate` makes them, [batch, tokens]."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
