"""gpt-oss: attention sinks, windows in every other layer, a mixture of experts with biases."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.gpt_oss.configuration_gpt_oss import GptOssConfig
from swathe.modeling.heads import ForSequenceClassification, ForTokenClassification
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.moe import GptOssMLP
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.moe_decoder import MoeCausalLM, MoeLayer, MoeModel


class GptOssAttention(SelfAttention):
    """Self-attention with one logit a head, `sinks`, that takes weight and gives none."""

    def make_extras(self, config: DecoderConfig) -> None:
        """The sinks (H,)."""
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))


class GptOssDecoderLayer(MoeLayer):
    """norm, attention with sinks, norm, experts."""

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Rounded once, after the weight."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps, casting="fp32")

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """Attention with sinks."""
        return GptOssAttention(config, layer_idx)

    @staticmethod
    def make_mlp(config: DecoderConfig, layer_idx: int) -> nn.Module:
        """The layer's experts."""
        assert isinstance(config, GptOssConfig)
        return GptOssMLP(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            limit=config.swiglu_limit,
            alpha=config.swiglu_alpha,
        )


class GptOssPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: GptOssConfig
    config_class: ClassVar[type[PreTrainedConfig]] = GptOssConfig
    _no_split_modules: ClassVar[tuple[str, ...]] = ("GptOssDecoderLayer",)
    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    )


class GptOssModel(GptOssPreTrainedModel, MoeModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = GptOssDecoderLayer


class GptOssForCausalLM(GptOssPreTrainedModel, MoeCausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = GptOssModel


class GptOssForSequenceClassification(ForSequenceClassification, GptOssPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = GptOssModel


class GptOssForTokenClassification(ForTokenClassification, GptOssPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = GptOssModel
