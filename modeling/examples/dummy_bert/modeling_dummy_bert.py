"""DummyBert: the guide's BERT, of which only what positions do is its own.

Everything else is the family's: post-norm layers, the decoder with its caches and cross-attention,
the heads and their losses. `attention.self.distance_embedding` is the only name in a checkpoint
that BERT has not, besides the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.examples.dummy_bert.configuration_dummy_bert import DummyBertConfig
from swathe.modeling.examples.dummy_bert.relative_positions import DummyBertSelfAttention
from swathe.modeling.families.bert.attention_bert import BertSelfAttention
from swathe.modeling.families.bert.body_bert import BertModel, BertPreTrainedModel
from swathe.modeling.families.bert.encoder_bert import BertEmbeddings, BertLayer
from swathe.modeling.families.bert.modeling_bert import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from swathe.modeling.layers.layer_norm import LayerNorm


class DummyBertEmbeddings(BertEmbeddings):
    """BERT's; where positions are relative, tokens get no vector for theirs."""

    def __init__(self, config: DummyBertConfig) -> None:
        super().__init__(config)
        self.absolute = config.position_embedding_type == "absolute"
        if not self.absolute:
            # the table stays, since files have it; nothing reads it, so that nothing trains it
            self.position_embeddings.requires_grad_(False)
            self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, residual=False)

    def normed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The norm of hidden (B, T, hidden), with the positions' vectors where these are used."""
        return super().normed(hidden, positions) if self.absolute else self.LayerNorm(hidden)


class DummyBertLayer(BertLayer):
    """BERT's, around attention with distances; cross-attention has none."""

    self_attention: ClassVar[type[BertSelfAttention]] = DummyBertSelfAttention


class DummyBertPreTrainedModel(BertPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: DummyBertConfig
    config_class: ClassVar[type[PreTrainedConfig]] = DummyBertConfig
    base_model_prefix: ClassVar[str] = "dummy_bert"
    _no_split_modules: ClassVar[tuple[str, ...]] = ("DummyBertEmbeddings", "DummyBertLayer")

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """As every model's; the tables of distances follow, and a distance keeps its vector."""
        super().resize_position_embeddings(new_num_position_embeddings)
        assert self.resize_report is not None
        replaced = dict(self.resize_report.replaced)
        for name, module in self.named_modules():
            table = getattr(module, "distance_embedding", None)
            distances = 2 * new_num_position_embeddings - 1
            if isinstance(module, DummyBertSelfAttention) and table is not None:
                was = tuple(table.weight.shape)
                if was[0] != distances:
                    fresh = nn.Embedding(distances, was[1]).to(table.weight)
                    self._init_weights(fresh)
                    module.resize_distances(fresh)
                    replaced[f"{name}.distance_embedding.weight"] = (was, (distances, was[1]))
        self.resize_report = replace(self.resize_report, replaced=replaced)


class DummyBertModel(DummyBertPreTrainedModel, BertModel):
    """The body: token ids to hidden states, and with a pooler to one vector a sequence."""

    embeddings_class: ClassVar[type[BertEmbeddings]] = DummyBertEmbeddings
    layer_class: ClassVar[type[BertLayer]] = DummyBertLayer

    def place(
        self,
        words: Tensor,
        attention_mask: Tensor | Mask | None,
        position_ids: Tensor | None,
        cache: DynamicCache | StaticCache | None,
    ) -> tuple[Mask, Tensor]:
        """As BERT's. Raises ValueError for position_ids that nothing would read."""
        kind = self.config.position_embedding_type
        if position_ids is not None and kind != "absolute":
            raise ValueError(
                f"position_ids are given, but with position_embedding_type={kind!r} only the order "
                "of tokens counts; leave them out"
            )
        return super().place(words, attention_mask, position_ids, cache)


class DummyBertForMaskedLM(DummyBertPreTrainedModel, BertForMaskedLM):
    """The body and logits over the vocabulary, tied to the embeddings where configured."""

    body_class: ClassVar[type[BertModel]] = DummyBertModel
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "dummy_bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


class DummyBertForSequenceClassification(DummyBertPreTrainedModel, BertForSequenceClassification):
    """The body and a classifier of sequences on the pooled vector."""

    body_class: ClassVar[type[BertModel]] = DummyBertModel


class DummyBertForTokenClassification(DummyBertPreTrainedModel, BertForTokenClassification):
    """The body and a classifier of tokens."""

    body_class: ClassVar[type[BertModel]] = DummyBertModel


class DummyBertForQuestionAnswering(DummyBertPreTrainedModel, BertForQuestionAnswering):
    """The body and two logits a token, for the start and the end of an answer."""

    body_class: ClassVar[type[BertModel]] = DummyBertModel
