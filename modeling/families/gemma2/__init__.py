"""Gemma 2."""

CLASSES = {"config": "Gemma2Config", "base": "Gemma2Model", "causal_lm": "Gemma2ForCausalLM"}
