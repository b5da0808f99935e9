"""Phi-3, Phi-3.5 and Phi-4-mini."""

CLASSES = {
    "config": "Phi3Config",
    "base": "Phi3Model",
    "causal_lm": "Phi3ForCausalLM",
    "seq_cls": "Phi3ForSequenceClassification",
    "token_cls": "Phi3ForTokenClassification",
}
