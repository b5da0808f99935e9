"""Gemma 2: norms before and after attention and MLP, softcaps, windows in every other layer."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.gemma2.configuration_gemma2 import Gemma2Config
from swathe.modeling.heads import ForSequenceClassification, ForTokenClassification
from swathe.modeling.layers.decoder import DecoderLayer, SandwichLayer
from swathe.modeling.layers.scaled_embedding import ScaledEmbedding


class Gemma2PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Gemma2Config
    config_class: ClassVar[type[PreTrainedConfig]] = Gemma2Config
    _no_split_modules: ClassVar[tuple[str, ...]] = ("SandwichLayer",)


class Gemma2Model(Gemma2PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states; `inputs_embeds` come scaled."""

    layer_class: ClassVar[type[DecoderLayer]] = SandwichLayer

    @staticmethod
    def make_embedding(config: DecoderConfig) -> nn.Embedding:
        """Embeddings times sqrt(hidden_size)."""
        return ScaledEmbedding.of(config)


class Gemma2ForCausalLM(Gemma2PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary, whose logits have a softcap."""

    body_class: ClassVar[type[DecoderModel]] = Gemma2Model


class Gemma2ForSequenceClassification(ForSequenceClassification, Gemma2PreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Gemma2Model


class Gemma2ForTokenClassification(ForTokenClassification, Gemma2PreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = Gemma2Model
