"""Mixtral 8x7B and 8x22B."""

CLASSES = {
    "config": "MixtralConfig",
    "base": "MixtralModel",
    "causal_lm": "MixtralForCausalLM",
    "seq_cls": "MixtralForSequenceClassification",
    "token_cls": "MixtralForTokenClassification",
    "question_answering": "MixtralForQuestionAnswering",
}
