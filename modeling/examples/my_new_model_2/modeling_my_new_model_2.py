"""MyNewModel2: Llama's layers, norms by 1 + weight, embeddings times sqrt(hidden_size)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.examples.my_new_model_2.configuration_my_new_model_2 import MyNewModel2Config
from swathe.modeling.heads import ForSequenceClassification
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.layers.scaled_embedding import ScaledEmbedding


class MyNewModel2DecoderLayer(DecoderLayer):
    """norm, attention, norm, MLP; the norms scale by 1 + weight, so that theirs begin at zero."""

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """1 + weight, rounded once."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0, casting="gemma")


class MyNewModel2PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: MyNewModel2Config
    config_class: ClassVar[type[PreTrainedConfig]] = MyNewModel2Config
    _no_split_modules: ClassVar[tuple[str, ...]] = ("MyNewModel2DecoderLayer",)


class MyNewModel2Model(MyNewModel2PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states; `inputs_embeds` come scaled."""

    layer_class: ClassVar[type[DecoderLayer]] = MyNewModel2DecoderLayer

    @staticmethod
    def make_embedding(config: DecoderConfig) -> nn.Embedding:
        """Embeddings times sqrt(hidden_size)."""
        return ScaledEmbedding.of(config)


class MyNewModel2ForSequenceClassification(ForSequenceClassification, MyNewModel2PreTrainedModel):
    """The body and a classifier of sequences, on the last real token of each."""

    body_class = MyNewModel2Model
