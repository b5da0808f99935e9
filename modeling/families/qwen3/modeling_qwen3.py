"""Qwen3: Llama's layers, whose queries and keys are normed head by head before they are turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.qwen3.configuration_qwen3 import Qwen3Config
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from swathe.modeling.layers.attention import NormedAttention, SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer


class Qwen3DecoderLayer(DecoderLayer):
    """norm, attention with head norms, norm, MLP."""

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """Attention with q_norm and k_norm."""
        return NormedAttention(config, layer_idx)


class Qwen3PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Qwen3Config
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen3Config
    _no_split_modules: ClassVar[tuple[str, ...]] = ("Qwen3DecoderLayer",)


class Qwen3Model(Qwen3PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = Qwen3DecoderLayer


class Qwen3ForCausalLM(Qwen3PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Qwen3Model


class Qwen3ForSequenceClassification(ForSequenceClassification, Qwen3PreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Qwen3Model


class Qwen3ForTokenClassification(ForTokenClassification, Qwen3PreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = Qwen3Model


class Qwen3ForQuestionAnswering(ForQuestionAnswering, Qwen3PreTrainedModel):
    """The body and two logits a token; HF stores the body of this one as `transformer`."""

    base_model_prefix: ClassVar[str] = "transformer"
    body_class = Qwen3Model
    _key_renames: ClassVar[Mapping[str, str]] = {r"^model\.": "transformer."}
