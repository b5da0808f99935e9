"""Mistral: Llama's layers, each query of which sees a sliding window of keys."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.families.mistral.configuration_mistral import MistralConfig
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class MistralPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: MistralConfig
    config_class: ClassVar[type[PreTrainedConfig]] = MistralConfig


class MistralModel(MistralPreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class MistralForCausalLM(MistralPreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = MistralModel


class MistralForSequenceClassification(ForSequenceClassification, MistralPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = MistralModel


class MistralForTokenClassification(ForTokenClassification, MistralPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = MistralModel


class MistralForQuestionAnswering(ForQuestionAnswering, MistralPreTrainedModel):
    """The body and two logits a token."""

    body_class = MistralModel
