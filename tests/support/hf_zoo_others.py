"""Multimodal models, read through their text alone, and encoders: entries of the zoo."""

from __future__ import annotations

from typing import Any

from support.hf_zoo import Entry
from support.hf_zoo_types import LACKS, LAYERED_ROPE, MROPE, PER_LAYER, QWEN4

SECTIONS = {"text_config": {"rope_parameters": MROPE}}
HALF_ROPE = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
SMALL_EYE = {"embed_dim": 64, "mlp_ratio": 2}
STACKED = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}

# Multimodal type: what its configuration has besides hf_zoo.TINY.
TOWERS: dict[str, dict[str, Any]] = {
    "aria": {},
    "aya_vision": {},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass": {"text_config": LAYERED_ROPE},
    "deepseek_vl": {},
    "exaone4_5": {},
    "fuyu": {},
    "gemma3": {},
    "gemma4": {"text_config": PER_LAYER},
    "gemma4_unified": {},
    "git": {},
    "glm46v": SECTIONS,
    "glm4v": SECTIONS,
    "glm4v_moe": {"text_config": {"rope_parameters": HALF_ROPE}},
    "glm_ocr": SECTIONS,
    "got_ocr2": {"vision_config": {"output_channels": 16, "mlp_dim": 96}},
    "granite_docling": {},
    "hyperclovax_vision_v2": {},
    "idefics2": {},
    "idefics3": {},
    "internvl": {},
    "kimi_k25": {},
    "kosmos-2.5": {},
    "lfm2_vl": {},
    "lfm3_vl": {},
    "lighton_ocr": {},
    "llava": {},
    "llava_next": {},
    "llava_next_video": {},
    "llava_onevision": {},
    "minicpm_ocr": {},
    "minicpmv4_6": {},
    "minicpmv4_7": {},
    "mistral3": {},
    "mistral4": {},
    "mistral_large4": {},
    "mllama": {},
    "ovis2": {},
    "paddleocr_vl": SECTIONS,
    "paligemma": {},
    "qianfan_ocr": {},
    "qwen2_5_vl": SECTIONS,
    "qwen2_vl": {**SECTIONS, "vision_config": SMALL_EYE},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_vl": {**SECTIONS, "vision_config": STACKED},
    "qwen3_vl_moe": {**SECTIONS, "vision_config": STACKED},
    "qwen4_exp": {"text_config": QWEN4},
    "shieldgemma2": {},
    "smolvlm": {},
    "step3p7": {},
    "video_llama_3": {},
    "video_llava": {},
    "vipllava": {},
}
MULTIMODAL = {
    name: Entry(name, "AutoModelForImageTextToText", "", changes, LACKS.get(name, {}), "multimodal")
    for name, changes in TOWERS.items()
}

T5 = {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 2}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 12}
# Encoder type: (class to build, type of its configuration, what that has besides hf_zoo.TINY).
ENCODER_TYPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: ("AutoModel", "", changes)
    for name, changes in {
        "albert": {},
        "bert": {},
        "camembert": {},
        "convbert": {},
        "data2vec-text": {},
        "deberta": {},
        "deberta-v2": {},
        "distilbert": {"dim": 64, "hidden_dim": 96},
        "electra": {},
        "ernie": {},
        "esm": {},
        "eurobert": {},
        "ibert": {},
        "layoutlm": {},
        "longformer": {"attention_window": 4},
        "megatron-bert": {},
        "mobilebert": {},
        "modernbert": {"local_attention": 6},
        "mpnet": {},
        "mra": {},
        "nomic_bert": {},
        "nystromformer": {},
        "rembert": {},
        "roberta": {},
        "roberta-prelayernorm": {},
        "roformer": {},
        "squeezebert": {},
        "xlm-roberta": {},
        "xlm-roberta-xl": {},
        "yoso": {},
        "clip_text_model": {},
        "vit": {},
        "deit": {},
        "beit": {},
        "dinov2": {},
        "dinov3_vit": {},
        "clip_vision_model": {},
        "siglip_vision_model": {},
        "ijepa": {},
    }.items()
} | {
    "t5": ("T5EncoderModel", "t5", T5),
    "mt5": ("MT5EncoderModel", "mt5", T5),
    "umt5": ("UMT5EncoderModel", "umt5", T5),
    "siglip_text_model": ("SiglipTextModel", "siglip_text_model", {}),
    "whisper": ("models.whisper.modeling_whisper.WhisperEncoder", "whisper", AUDIO),
}
ENCODERS = {
    name: Entry(name, head, config, changes, {}, "encoder")
    for name, (head, config, changes) in ENCODER_TYPES.items()
}
