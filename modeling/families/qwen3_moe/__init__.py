"""Qwen3, the mixtures of experts."""

CLASSES = {
    "config": "Qwen3MoeConfig",
    "base": "Qwen3MoeModel",
    "causal_lm": "Qwen3MoeForCausalLM",
    "seq_cls": "Qwen3MoeForSequenceClassification",
    "token_cls": "Qwen3MoeForTokenClassification",
    "question_answering": "Qwen3MoeForQuestionAnswering",
}
