"""Qwen2: Llama's layers with biases on queries, keys and values; windows in some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.families.qwen2.configuration_qwen2 import Qwen2Config
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class Qwen2PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Qwen2Config
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen2Config


class Qwen2Model(Qwen2PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class Qwen2ForCausalLM(Qwen2PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Qwen2Model


class Qwen2ForSequenceClassification(ForSequenceClassification, Qwen2PreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Qwen2Model


class Qwen2ForTokenClassification(ForTokenClassification, Qwen2PreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = Qwen2Model


class Qwen2ForQuestionAnswering(ForQuestionAnswering, Qwen2PreTrainedModel):
    """The body and two logits a token; HF stores the body of this one as `transformer`."""

    base_model_prefix: ClassVar[str] = "transformer"
    body_class = Qwen2Model
    _key_renames: ClassVar[Mapping[str, str]] = {r"^model\.": "transformer."}
