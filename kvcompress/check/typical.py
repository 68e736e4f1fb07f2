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
# layers with biases by distance, some of them with other heads and a window
_INKLING: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "head_dim": 16,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "sliding_window_size": 64,
    "d_rel": 4,
    "rel_extent": 96,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LOOP = {
    "n_layers_per_attn_res_block": 2,
    "loop_layer_index_start": 2,
    "loop_layer_index_end": 4,
    "loop_num_passes": 3,
    "loop_gate_rank": 8,
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
    # layers that attend share their weights, and each has its own keys
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_attention_heads": 8,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_attention_heads": 8,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "chunk_size": 8,
        # which single steps do not heed
        "time_step_min": 1e-9,
        "use_mem_rope": True,
    },
    # a cache class of its own, which counts no tokens where the first layer attends to none
    "minimax": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "block_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
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
    # without its scaling by columns, which are others in a padded batch
    "inkling_text": {
        **_INKLING,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {
        **_INKLING,
        "log_scaling_n_floor": 48,
        "n_layers_per_attn_res_block": 2,
        "unpadded_vocab_size": 512,
    },
    # which runs its third and fourth layer three times
    "inkling2_loop_text": {
        **_INKLING,
        "num_hidden_layers": 6,
        "layer_types": ["hybrid_sliding", "hybrid"] * 3,
        "log_scaling_n_floor": 48,
        "unpadded_vocab_size": 512,
        **_LOOP,
    },
    "helium": {**COMMON, "num_hidden_layers": 3, "head_dim": 16},
    # query heads are those of the experts of a token, two of four
    "jetmoe": {
        **COMMON,
        "num_hidden_layers": 3,
        "kv_channels": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # two layers for each of four passes
    "hrm_text": {
        **COMMON,
        "num_hidden_layers": 1,
        "H_cycles": 2,
        "L_cycles": 1,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    # two layers that attend to keys and values of the first two
    "gemma3n_text": {
        **COMMON,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
        "head_dim": 16,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "dbrx": {
        "vocab_size": 512,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500_000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "pad_token_id": _PAD,
    },
    # heeds its window with a cache only: as long as what it was trained for
    "moshi": {**COMMON, "num_hidden_layers": 3, "head_dim": 16, "ffn_dim": 192, "sliding_window": 512},
}

_AXES: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [24, 20, 20]}
_GLM_V = {"text_config": {"rope_parameters": {**_AXES, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}}
_COMPASS = {"rope_parameters": {"full_attention": _AXES}}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 8,
}
# what the defaults of a type lack for a model that runs, as its checkpoints have it
COMPLETED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGAZ": 5}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 6}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "glm46v": _GLM_V,
    "glm4v": _GLM_V,
    "glm4v_moe": {"text_config": {**_GLM_V["text_config"], "head_dim": 128}},
    "glmga": _GLM_V,
    "granite4_vision": {"deepstack_layer_map": [[-1, 0], [-1, 1]], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_AXES, "mrope_section": [16, 16, 16, 16]}}},
    "inkling2_loop": {"text_config": _LOOP},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 3},
    "qwen3_omni_moe_thinker": {
        "text_config": {"num_attention_heads": 32, "head_dim": 128, "rope_parameters": _AXES},
        "vision_start_token_id": 3,
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 512}},
    "xmod": {"default_language": "en_XX"},
}
