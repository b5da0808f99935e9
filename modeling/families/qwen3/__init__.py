"""Qwen3, the dense models."""

CLASSES = {
    "config": "Qwen3Config",
    "base": "Qwen3Model",
    "causal_lm": "Qwen3ForCausalLM",
    "seq_cls": "Qwen3ForSequenceClassification",
    "token_cls": "Qwen3ForTokenClassification",
    "question_answering": "Qwen3ForQuestionAnswering",
}
