"""Llama 1 to 3 and the models that share its layout: TinyLlama, SmolLM2, SmolLM."""

CLASSES = {"config": "LlamaConfig", "base": "LlamaModel", "causal_lm": "LlamaForCausalLM"}
