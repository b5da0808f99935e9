"""Qwen2: Llama's layers with biases on queries, keys and values; windows in some of them."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.families.qwen2.configuration_qwen2 import Qwen2Config


class Qwen2PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Qwen2Config
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen2Config


class Qwen2Model(Qwen2PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class Qwen2ForCausalLM(Qwen2PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Qwen2Model
