"""gpt-oss."""

CLASSES = {
    "config": "GptOssConfig",
    "base": "GptOssModel",
    "causal_lm": "GptOssForCausalLM",
    "seq_cls": "GptOssForSequenceClassification",
    "token_cls": "GptOssForTokenClassification",
}
