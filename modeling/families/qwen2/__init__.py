"""Qwen2 and Qwen2.5."""

CLASSES = {
    "config": "Qwen2Config",
    "base": "Qwen2Model",
    "causal_lm": "Qwen2ForCausalLM",
    "seq_cls": "Qwen2ForSequenceClassification",
    "token_cls": "Qwen2ForTokenClassification",
    "question_answering": "Qwen2ForQuestionAnswering",
}
