"""Mixtral: Mistral's layers, each with a mixture of experts for its MLP."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.mixtral.configuration_mixtral import MixtralConfig
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.moe import MIXTRAL_TRANSFORMS, MixtralSparseMoeBlock
from swathe.modeling.moe_decoder import MoeCausalLM, MoeLayer, MoeModel


class MixtralDecoderLayer(MoeLayer):
    """norm, attention, norm, experts."""

    @staticmethod
    def make_mlp(config: DecoderConfig, layer_idx: int) -> nn.Module:
        """The layer's experts."""
        assert isinstance(config, MixtralConfig)
        return MixtralSparseMoeBlock(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.activation,
            jitter=config.router_jitter_noise,
        )


class MixtralPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: MixtralConfig
    config_class: ClassVar[type[PreTrainedConfig]] = MixtralConfig
    _no_split_modules: ClassVar[tuple[str, ...]] = ("MixtralDecoderLayer",)
    _weight_transforms = MIXTRAL_TRANSFORMS


class MixtralModel(MixtralPreTrainedModel, MoeModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = MixtralDecoderLayer


class MixtralForCausalLM(MixtralPreTrainedModel, MoeCausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = MixtralModel


class MixtralForSequenceClassification(ForSequenceClassification, MixtralPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = MixtralModel


class MixtralForTokenClassification(ForTokenClassification, MixtralPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = MixtralModel


class MixtralForQuestionAnswering(ForQuestionAnswering, MixtralPreTrainedModel):
    """The body and two logits a token."""

    body_class = MixtralModel
