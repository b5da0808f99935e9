"""What the tiny configuration of a model type has besides hf_zoo.TINY, and what the type lacks."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.hf_zoo import Entry

MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
GROUPS = {"n_groups": 2, "conv_kernel": 4, "chunk_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
LAYERED_ROPE = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
}
PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 160,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 32,
}
TEXT_4 = {"text_config": PER_LAYER}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
}
DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "shared_experts_intermediate_size": 32,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "use_cache": False,
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
        "global_config": {"hidden_size": 128},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": LAYERED_ROPE,
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "ctrl": {"dff": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 4, "index_head_dim": 16},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **PER_LAYER,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
    },
    "gemma4": TEXT_4,
    "gemma4_text": PER_LAYER,
    "gemma4_unified": TEXT_4,
    "gemma4_unified_text": PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **MAMBA2},
    "inkling2_loop_text": {
        "unpadded_vocab_size": 160,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "n_layers_per_attn_res_block": 1,
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {
        "unpadded_vocab_size": 160,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "n_layers_per_attn_res_block": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 1, "moe_topk": 2},
    "mamba2": {**GROUPS, "num_heads": 8, "head_dim": 16, "state_size": 8},
    "moshi": {"audio_vocab_size": 32},
    "nemotron_h": {
        **GROUPS,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 2,
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 64,
            "input_size": 16,
        }
    },
    "got_ocr2": {"vision_config": {"output_channels": 16, "mlp_dim": 96}},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "num_hidden_layers": None,
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "local_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 20,
        "shape_embed_dim": 16,
        "shape_vocab_size": 20,
    },
    "xlnet": {"d_head": 16, "d_inner": 96, "max_position_embeddings": None},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layer_types": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

HEADS = {
    "musicgen": ("MusicgenForCausalLM", "musicgen_decoder"),
    "musicgen_melody": ("MusicgenMelodyForCausalLM", "musicgen_melody_decoder"),
}
NO_CACHE = "returns no cache that a second call could be given"
# What a type cannot do, in transformers itself: a run of hf_zoo_judge.RUNS, "gradients" in eval
# mode, or "steady rounding": then its own error says little about what an error may be.
LACKS: dict[str, dict[str, str]] = {
    "blt": {"decode": "BltConfig has no num_hidden_layers, which a cache is made from"},
    "cpmant": {"decode": "its position bias counts the prompt twice with a cache"},
    "diffllama": {"steady rounding": "every head is summed into one number, lambda"},
    "git": {"loss": "cuts image tokens off the logits that are not there without an image"},
    "musicgen": {"loss": "takes labels by codebook"},
    "musicgen_melody": {"loss": "takes labels by codebook"},
    "openai-gpt": {"decode": NO_CACHE},
    "recurrent_gemma": {"decode": NO_CACHE},
    "reformer": {"decode": NO_CACHE, "gradients": "asserts train mode"},
    "rwkv": {"gradients": "writes over its state in place"},
    "xlm": {"decode": NO_CACHE},
    "xlnet": {"decode": "its memory takes no attention mask"},
}
# Types that are not built at all, and why.
UNBUILT = {
    "dots3_note": "its default configuration cannot be cut; its text model is dots3_note_text",
    "gemma3n": "its image tower is one of timm's; its text model is gemma3n_text",
    "gemma4_assistant": "drafts from another model's key-value states",
    "gemma4_unified_assistant": "drafts from another model's key-value states",
}
# Types that do not run, without any treatment, in a transformers older than that of the list.
OLDER = {
    "dbrx": "its experts read another configuration's hidden size",
    "deepseek_v4": "returns no cache",
    "git": "counts on past key-values",
    "granitemoehybrid": "its cache has no update for a state-space layer",
    "mamba2": "decoding takes no padding",
    "zamba": "asks for CUDA kernels",
}
CAUSAL: dict[str, Entry] = {
    name: Entry(
        name,
        *HEADS.get(name, ("AutoModelForCausalLM", "")),
        CHANGES.get(name, {}),
        LACKS.get(name, {}),
    )
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name not in UNBUILT
}
