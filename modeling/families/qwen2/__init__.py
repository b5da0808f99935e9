"""Qwen2 and Qwen2.5."""

CLASSES = {"config": "Qwen2Config", "base": "Qwen2Model", "causal_lm": "Qwen2ForCausalLM"}
