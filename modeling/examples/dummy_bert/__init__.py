"""DummyBert: BERT whose positions may be relative, as an encoder or as a decoder."""

from swathe.modeling.auto import register_model
from swathe.modeling.examples.dummy_bert.configuration_dummy_bert import DummyBertConfig
from swathe.modeling.examples.dummy_bert.modeling_dummy_bert import (
    DummyBertForMaskedLM,
    DummyBertForQuestionAnswering,
    DummyBertForSequenceClassification,
    DummyBertForTokenClassification,
    DummyBertModel,
)

__all__ = [
    "DummyBertConfig",
    "DummyBertForMaskedLM",
    "DummyBertForQuestionAnswering",
    "DummyBertForSequenceClassification",
    "DummyBertForTokenClassification",
    "DummyBertModel",
    "register",
]


def register() -> None:
    """Make the Auto classes find the model. Raises ValueError where its model_type is taken."""
    register_model(
        DummyBertConfig.model_type,
        DummyBertConfig,
        {
            "base": DummyBertModel,
            "masked_lm": DummyBertForMaskedLM,
            "seq_cls": DummyBertForSequenceClassification,
            "token_cls": DummyBertForTokenClassification,
            "question_answering": DummyBertForQuestionAnswering,
        },
    )
