"""Gemma 3: the text models, and the text part of the others."""

CLASSES = {
    "config": "Gemma3TextConfig",
    "base": "Gemma3TextModel",
    "causal_lm": "Gemma3ForCausalLM",
    "seq_cls": "Gemma3TextForSequenceClassification",
}
