"""Gemma 1 and the models of its layout."""

CLASSES = {
    "config": "GemmaConfig",
    "base": "GemmaModel",
    "causal_lm": "GemmaForCausalLM",
    "seq_cls": "GemmaForSequenceClassification",
    "token_cls": "GemmaForTokenClassification",
}
