"""Qwen3, the dense models."""

CLASSES = {"config": "Qwen3Config", "base": "Qwen3Model", "causal_lm": "Qwen3ForCausalLM"}
