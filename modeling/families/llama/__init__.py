"""Llama 1 to 3 and the models that share its layout: TinyLlama, SmolLM2, SmolLM."""

CLASSES = {
    "config": "LlamaConfig",
    "base": "LlamaModel",
    "causal_lm": "LlamaForCausalLM",
    "seq_cls": "LlamaForSequenceClassification",
    "token_cls": "LlamaForTokenClassification",
    "question_answering": "LlamaForQuestionAnswering",
}
