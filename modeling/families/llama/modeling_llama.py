"""Llama: embeddings, pre-norm decoder layers, a final norm, and a language-model head.

Parameter names are the checkpoint's. Positions are rotary, keys and values are shared by groups of
query heads, the MLP is gated: this is what modeling/decoder.py builds where a family says no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class LlamaPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: LlamaConfig
    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig


class LlamaModel(LlamaPreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class LlamaForCausalLM(LlamaPreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = LlamaModel


class LlamaForSequenceClassification(ForSequenceClassification, LlamaPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = LlamaModel


class LlamaForTokenClassification(ForTokenClassification, LlamaPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = LlamaModel


class LlamaForQuestionAnswering(ForQuestionAnswering, LlamaPreTrainedModel):
    """The body and two logits a token; HF stores the body of this one as `transformer`."""

    base_model_prefix: ClassVar[str] = "transformer"
    body_class = LlamaModel
    _key_renames: ClassVar[Mapping[str, str]] = {r"^model\.": "transformer."}
