"""BERT below its heads: embeddings, post-norm layers and the pooler, under HF's names.

A layer adds first and normalises then, so that both are one call of the layer_norm op and nothing
needs the sum itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.families.bert.attention_bert import (
    BertAttention,
    BertCrossAttention,
    BertOutput,
    BertSelfAttention,
    Source,
)
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.gradients import run_layer
from swathe.modeling.layers.activations import ACT2FN
from swathe.modeling.layers.capture import Capture
from swathe.modeling.layers.layer_norm import LayerNorm
from swathe.modeling.masks import looked_at
from swathe.modeling.outputs import BaseModelOutputWithPoolingAndCrossAttentions


class BertEmbeddings(nn.Module):
    """LayerNorm and dropout of the sum of word, token type and position vectors."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = LayerNorm(size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """(B, T, hidden) of word vectors, positions (B or 1, T) and types (B or 1, T), 0 if None.

        Raises ValueError for types that do not fit, and on a CPU for ids outside their tables.
        """
        B, T, _ = words.shape
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=words.device)
        elif tuple(token_type_ids.shape) not in ((B, T), (1, T)):
            raise ValueError(
                f"token_type_ids has shape {tuple(token_type_ids.shape)}; {B} sequences of {T} "
                f"tokens need ({B}, {T}) or (1, {T})"
            )
        kinds = self.token_type_embeddings
        _check_ids("token_type_ids", token_type_ids, kinds, "type_vocab_size")
        return self.dropout(self.normed(words + kinds(token_type_ids), positions))

    def normed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The norm of hidden (B, T, hidden) and the vectors of positions (B or 1, T)."""
        places = self.position_embeddings
        _check_ids("position_ids", positions, places, "max_position_embeddings")
        return self.LayerNorm(places(positions).expand_as(hidden), hidden)[0]


def _check_ids(name: str, ids: Tensor, table: nn.Embedding, field: str) -> None:
    if not looked_at(ids):
        return
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= table.num_embeddings:
        raise ValueError(
            f"{name} go from {low} to {high}; the model has {field}={table.num_embeddings}, so "
            f"they must be 0 to {table.num_embeddings - 1}"
        )


class BertIntermediate(nn.Module):
    """Projection and activation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, intermediate)."""
        return self.intermediate_act_fn(self.dense(hidden))


class BertLayer(nn.Module):
    """Attention and MLP; `checkpointing` holds the arguments of gradients.run_layer."""

    self_attention: ClassVar[type[BertSelfAttention]] = BertSelfAttention

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, self.self_attention(config, layer_idx))
        self.crossattention: BertAttention | None = None
        if config.add_cross_attention:
            self.crossattention = BertAttention(config, BertCrossAttention(config, layer_idx))
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)
        self.chunk = config.chunk_size_feed_forward
        self.checkpointing: dict[str, Any] | None = None

    def forward(
        self,
        hidden: Tensor,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        source: Source | None = None,
        output_attentions: Capture = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, T, hidden), and the weights of self- and cross-attention where they are asked for.

        Cross-attention is passed over where there is no `source`. With chunk_size_feed_forward > 0
        the MLP takes that many tokens at a time.
        """
        attended, weights = self.attention(hidden, mask, cache, output_attentions)
        crossed = None
        if source is not None:
            assert self.crossattention is not None
            attended, crossed = self.crossattention(attended, source, output_attentions)
        if self.chunk == 0:
            return self.output(self.intermediate(attended), attended), weights, crossed
        pieces = [self.output(self.intermediate(x), x) for x in attended.split(self.chunk, dim=1)]
        return torch.cat(pieces, dim=1), weights, crossed


class BertEncoder(nn.Module):
    """The stack of layers, a decoder's as well; the name is the one in checkpoints."""

    def __init__(self, config: BertConfig, layer_class: type[BertLayer] = BertLayer) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))

    def forward(
        self,
        hidden: Tensor,
        mask: Mask,
        cache: DynamicCache | StaticCache | None,
        source: Source | None,
        output_attentions: Capture,
        kept: frozenset[int],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """The last state, those numbered in `kept` from the embeddings on, and all weights."""
        states: list[Any] = [hidden if 0 in kept else None]
        attentions, crossed = [], []
        for i, layer in enumerate(self.layer, 1):
            hidden, own, other = run_layer(layer, hidden, mask, cache, source, output_attentions)
            states.append(hidden if i in kept else None)
            attentions.append(own)
            crossed.append(other)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if kept else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(crossed) if output_attentions and source is not None else None,
        )


class BertPooler(nn.Module):
    """tanh of a projection of the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (B, hidden)."""
        return torch.tanh(self.dense(hidden[:, 0]))
