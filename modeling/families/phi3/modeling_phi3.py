"""Phi-3: Llama's layers with packed projections, and heads that are turned in part."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.phi3.configuration_phi3 import Phi3Config
from swathe.modeling.heads import ForSequenceClassification, ForTokenClassification
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.linear import Linear
from swathe.modeling.layers.mlp import PackedMLP


class Phi3Attention(SelfAttention):
    """Self-attention whose queries, keys and values come from one projection, `qkv_proj`."""

    def make_projections(self, config: DecoderConfig) -> None:
        """qkv_proj and o_proj."""
        assert config.num_key_value_heads is not None
        all_heads = config.num_attention_heads * self.head_dim
        kv_heads = config.num_key_value_heads * self.head_dim
        self.sizes = [all_heads, kv_heads, kv_heads]
        self.o_proj = Linear(all_heads, config.hidden_size, bias=False)
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=False)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, heads * D): views of one tensor."""
        q, k, v = self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        return q, k, v


class Phi3DecoderLayer(DecoderLayer):
    """norm, attention, dropout, norm, MLP, dropout."""

    def __init__(self, config: Phi3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.resid_pdrop = config.resid_pdrop

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """Attention with packed projections."""
        return Phi3Attention(config, layer_idx)

    @staticmethod
    def make_mlp(config: DecoderConfig, layer_idx: int) -> nn.Module:
        """The MLP with packed projections."""
        return PackedMLP(config.hidden_size, config.intermediate_size, config.activation)

    def add(self, attended: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's output, of which some may be dropped, on the stream."""
        return super().add(self._dropped(attended), stream)

    def finish(self, out: Tensor) -> Tensor:
        """The MLP's output, of which some may be dropped."""
        return self._dropped(out)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.resid_pdrop, self.training) if self.resid_pdrop else x


class Phi3PreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Phi3Config
    config_class: ClassVar[type[PreTrainedConfig]] = Phi3Config
    _no_split_modules: ClassVar[tuple[str, ...]] = ("Phi3DecoderLayer",)


class Phi3Model(Phi3PreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = Phi3DecoderLayer


class Phi3ForCausalLM(Phi3PreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Phi3Model


class Phi3ForSequenceClassification(ForSequenceClassification, Phi3PreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Phi3Model


class Phi3ForTokenClassification(ForTokenClassification, Phi3PreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = Phi3Model
