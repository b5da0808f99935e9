"""Rotary parameters that tests share: sets of every type, a family that turns part of a head."""

from __future__ import annotations

from typing import Any, ClassVar

from swathe.modeling.families.llama.configuration_llama import LlamaConfig

HEAD = 16
SIZES: dict[str, Any] = {
    "hidden_size": 4 * HEAD,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0],
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SETS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, long theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear, whole numbers": {"rope_type": "linear", "factor": 8, "rope_theta": 1000000},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, other theta": {"rope_type": "dynamic", "factor": 3.7, "rope_theta": 2e5},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False, "rope_theta": 150000.0},
    "yarn, gpt-oss": {
        **YARN,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000,
    },
    "yarn, DeepSeek-V3": {
        **YARN,
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn, Qwen2.5": {**YARN, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "yarn, betas": {**YARN, "beta_fast": 8, "beta_slow": 2, "rope_theta": 500.0},
    "yarn, equal betas": {**YARN, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5, "factor": 40},
    "yarn, mscale alone": {**YARN, "mscale": 0.707},
    "yarn, mscale 0": {**YARN, "mscale": 0.707, "mscale_all_dim": 0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.5, "mscale": 1.0},
    "yarn, factor 1": {**YARN, "factor": 1},
    "yarn, tiny original": {**YARN, "original_max_position_embeddings": 4},
    "longrope": LONGROPE,
    "longrope, factor": {**LONGROPE, "factor": 32.0, "rope_theta": 3e4},
    "longrope, attention_factor": {**LONGROPE, "attention_factor": 1.25},
    "longrope, nothing longer": {**LONGROPE, "original_max_position_embeddings": 128},
    "llama3": LLAMA3,
    "llama3, 3.2": {
        **LLAMA3,
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
    "llama3, all kinds": {**LLAMA3, "rope_theta": 20.0, "high_freq_factor": 9},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, factor": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.6,
        "factor": 4.0,
        "rope_theta": 1e6,
    },
    "proportional, whole": {"rope_type": "proportional", "partial_rotary_factor": 1.0},
    "proportional, nothing": {"rope_type": "proportional", "partial_rotary_factor": 0.0},
}


class PartialConfig(LlamaConfig):
    """Of a family that honours partial_rotary_factor."""

    model_type: ClassVar[str] = "partial"
    partial_rotary: ClassVar[bool] = True
