"""Qwen3 with experts: Qwen3's layers, most of them with a mixture of experts for an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import DecoderModel, DecoderPreTrainedModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.families.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from swathe.modeling.layers.attention import NormedAttention, SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.moe import QWEN_MOE_TRANSFORMS, Qwen3MoeSparseMoeBlock
from swathe.modeling.moe_decoder import MoeCausalLM, MoeModel


class Qwen3MoeDecoderLayer(DecoderLayer):
    """norm, attention with head norms, norm, and experts or an MLP."""

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """Attention with q_norm and k_norm."""
        return NormedAttention(config, layer_idx)

    @staticmethod
    def make_mlp(config: DecoderConfig, layer_idx: int) -> nn.Module:
        """Experts in layers that have them."""
        assert isinstance(config, Qwen3MoeConfig)
        if not config.is_sparse(layer_idx):
            return DecoderLayer.make_mlp(config, layer_idx)
        return Qwen3MoeSparseMoeBlock(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.activation,
            norm_topk_prob=config.norm_topk_prob,
        )

    def feed_forward(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output of experts or MLP, and the router's logits where there is one."""
        if isinstance(self.mlp, Qwen3MoeSparseMoeBlock):
            return self.mlp(normed)
        return self.mlp(normed), None


class Qwen3MoePreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: Qwen3MoeConfig
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen3MoeConfig
    _no_split_modules: ClassVar[tuple[str, ...]] = ("Qwen3MoeDecoderLayer",)
    _weight_transforms = QWEN_MOE_TRANSFORMS


class Qwen3MoeModel(Qwen3MoePreTrainedModel, MoeModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = Qwen3MoeDecoderLayer


class Qwen3MoeForCausalLM(Qwen3MoePreTrainedModel, MoeCausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = Qwen3MoeModel


class Qwen3MoeForSequenceClassification(ForSequenceClassification, Qwen3MoePreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = Qwen3MoeModel


class Qwen3MoeForTokenClassification(ForTokenClassification, Qwen3MoePreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = Qwen3MoeModel


class Qwen3MoeForQuestionAnswering(ForQuestionAnswering, Qwen3MoePreTrainedModel):
    """The body and two logits a token; HF stores the body of this one as `transformer`."""

    base_model_prefix: ClassVar[str] = "transformer"
    body_class = Qwen3MoeModel
    _key_renames: ClassVar[Mapping[str, str]] = {r"^model\.": "transformer."}
