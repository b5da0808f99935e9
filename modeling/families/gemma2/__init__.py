"""Gemma 2."""

CLASSES = {
    "config": "Gemma2Config",
    "base": "Gemma2Model",
    "causal_lm": "Gemma2ForCausalLM",
    "seq_cls": "Gemma2ForSequenceClassification",
    "token_cls": "Gemma2ForTokenClassification",
}
