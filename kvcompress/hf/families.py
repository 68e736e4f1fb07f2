"""transformers' classes that SwiftKV models are built on, by family, and the attention that their layers call."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ALL_ATTENTION_FUNCTIONS", "FAMILIES", "Family", "GradientCheckpointingLayer"]


@dataclass(frozen=True)
class Family:
    """The classes of a family of models.

    name: what its classes' names begin with. rotate: applies rotary embeddings to queries and keys. eager: its
    attention in plain PyTorch. softcap: the attribute of its attention that it passes as the softcap of logits, None if
    it passes none.
    """

    name: str
    causal: type[PreTrainedModel]
    config: Any
    decoder: Any
    layer: Any
    attention: Any
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    softcap: str | None = None


def _family(causal: type[PreTrainedModel], decoder: str = "Model", softcap: str | None = None) -> Family:
    """The family of a ForCausalLM class, whose other classes stand beside it."""
    name = causal.__name__.removesuffix("ForCausalLM")
    beside = vars(sys.modules[causal.__module__])
    return Family(
        name,
        causal,
        causal.config_class,
        beside[f"{name}{decoder}"],
        beside[f"{name}DecoderLayer"],
        beside[f"{name}Attention"],
        beside["apply_rotary_pos_emb"],
        beside["eager_attention_forward"],
        softcap,
    )


FAMILIES = (
    _family(LlamaForCausalLM),
    _family(MistralForCausalLM),
    _family(Qwen2ForCausalLM),
    _family(Qwen3ForCausalLM),
    _family(Gemma2ForCausalLM, softcap="attn_logit_softcapping"),
    _family(Gemma3ForCausalLM, "TextModel"),
    _family(GraniteForCausalLM),
    _family(Olmo2ForCausalLM),
    _family(Olmo3ForCausalLM),
    _family(Phi3ForCausalLM),
    _family(SmolLM3ForCausalLM),
)
