"""Sizes of small models of types whose defaults mix nothing, or cannot be made smaller by rule."""

from typing import Any

_PAD = 0
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": _PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    # the first layer attends to nothing, and the last one does
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    # convolutions, and the last layer attends to nothing
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "full_attention", "conv"]},
    # each layer attends and has states
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 128, "head_dim": 16, **_MAMBA},
    # Mamba, and two layers that keep nothing
    "nemotron_h": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "full_attention"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], **_MAMBA},
}

TYPICAL: dict[str, dict[str, Any]] = {
    **{name: {**COMMON, **settings} for name, settings in HYBRIDS.items()},
    "granitemoehybrid": {
        **COMMON,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **_MAMBA,
    },
    "lfm2_moe": {
        **COMMON,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "deepseek_v2": {
        **COMMON,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 56,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "helium": {**COMMON, "num_hidden_layers": 3, "head_dim": 16},
}
