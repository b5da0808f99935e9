"""Mistral 7B and its successors of the same layout."""

CLASSES = {
    "config": "MistralConfig",
    "base": "MistralModel",
    "causal_lm": "MistralForCausalLM",
    "seq_cls": "MistralForSequenceClassification",
    "token_cls": "MistralForTokenClassification",
    "question_answering": "MistralForQuestionAnswering",
}
