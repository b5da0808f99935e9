"""Gemma 3: Gemma 2's layers with head norms instead of a softcap, and two rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.qk_norm_rotary.api import NormCasting
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.gemma3_text.configuration_gemma3_text import Gemma3TextConfig
from swathe.modeling.heads import ForSequenceClassification
from swathe.modeling.layers.attention import NormedAttention, SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer, SandwichLayer
from swathe.modeling.layers.embedding import RotaryByLayerType, Rotation
from swathe.modeling.layers.scaled_embedding import ScaledEmbedding


class Gemma3Attention(NormedAttention):
    """Attention with head norms by 1 + weight, rounded once."""

    norm_offset: ClassVar[float] = 1.0
    norm_casting: ClassVar[NormCasting] = "gemma"


class Gemma3DecoderLayer(SandwichLayer):
    """norm, attention, norm, and norm, MLP, norm."""

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """Attention with q_norm and k_norm."""
        return Gemma3Attention(config, layer_idx)


class Gemma3PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Gemma3TextConfig
    config_class: ClassVar[type[PreTrainedConfig]] = Gemma3TextConfig
    _no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma3DecoderLayer",)


class Gemma3TextModel(Gemma3PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states; `inputs_embeds` come scaled."""

    layer_class: ClassVar[type[DecoderLayer]] = Gemma3DecoderLayer

    @staticmethod
    def make_embedding(config: DecoderConfig) -> nn.Embedding:
        """Embeddings times sqrt(hidden_size)."""
        return ScaledEmbedding.of(config)

    @staticmethod
    def make_rotary(config: DecoderConfig) -> nn.Module:
        """One rotation for either layer type."""
        return RotaryByLayerType.of(config)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Mapping[str, Rotation]:
        """The rotation of each layer type, made once a forward."""
        return self.rotary_emb(positions, dtype)


class Gemma3ForCausalLM(Gemma3PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Gemma3TextModel


class Gemma3TextForSequenceClassification(ForSequenceClassification, Gemma3PreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Gemma3TextModel
