"""BERT: the bidirectional encoder of Devlin et al. 2018, arXiv:1810.04805."""

CLASSES = {
    "config": "BertConfig",
    "base": "BertModel",
    "masked_lm": "BertForMaskedLM",
    "seq_cls": "BertForSequenceClassification",
    "token_cls": "BertForTokenClassification",
    "question_answering": "BertForQuestionAnswering",
}
