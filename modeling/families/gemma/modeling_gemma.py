"""Gemma: Llama's layers, norms by 1 + weight, embeddings times sqrt(hidden_size)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.gemma.configuration_gemma import GemmaConfig
from swathe.modeling.heads import ForSequenceClassification, ForTokenClassification
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.layers.scaled_embedding import ScaledEmbedding


class GemmaDecoderLayer(DecoderLayer):
    """norm, attention, norm, MLP."""

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """1 + weight, rounded once."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0, casting="gemma")


class GemmaPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: GemmaConfig
    config_class: ClassVar[type[PreTrainedConfig]] = GemmaConfig
    _no_split_modules: ClassVar[tuple[str, ...]] = ("GemmaDecoderLayer",)


class GemmaModel(GemmaPreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states; `inputs_embeds` come scaled."""

    layer_class: ClassVar[type[DecoderLayer]] = GemmaDecoderLayer

    @staticmethod
    def make_embedding(config: DecoderConfig) -> nn.Embedding:
        """Embeddings times sqrt(hidden_size)."""
        return ScaledEmbedding.of(config)


class GemmaForCausalLM(GemmaPreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = GemmaModel


class GemmaForSequenceClassification(ForSequenceClassification, GemmaPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = GemmaModel


class GemmaForTokenClassification(ForTokenClassification, GemmaPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = GemmaModel
