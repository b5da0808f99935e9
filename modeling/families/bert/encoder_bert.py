"""BERT below its heads: embeddings, post-norm layers and the pooler, under HF's names.

A layer adds first and normalises then, so that both are one call of the layer_norm op and nothing
needs the sum itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import (
    AttentionSpec,
    Mask,
    attention,
    attention_with_weights,
    resolve_attention,
)
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import AUTO, Choice
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.gradients import run_layer
from swathe.modeling.layers.activations import ACT2FN
from swathe.modeling.layers.layer_norm import LayerNorm
from swathe.modeling.policy import KernelModule


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
        kinds, places = self.token_type_embeddings, self.position_embeddings
        _check_ids("token_type_ids", token_type_ids, kinds, "type_vocab_size")
        _check_ids("position_ids", positions, places, "max_position_embeddings")
        hidden = words + kinds(token_type_ids)
        return self.dropout(self.LayerNorm(places(positions).expand_as(hidden), hidden)[0])


def _check_ids(name: str, ids: Tensor, table: nn.Embedding, field: str) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= table.num_embeddings:
        raise ValueError(
            f"{name} go from {low} to {high}; the model has {field}={table.num_embeddings}, so "
            f"they must be 0 to {table.num_embeddings - 1}"
        )


class BertSelfAttention(KernelModule):
    """Attention in both directions: three projections and one call into the attention op."""

    op: ClassVar[str] = "attn"

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        weight, dropout = self.query.weight, self.dropout > 0
        return resolve_attention(weight, self.head_dim, implementation, dropout=dropout)

    def forward(
        self, hidden: Tensor, mask: Mask, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden), and the weights (B, H, T, T) where they are asked for.

        Raises UnsupportedFeature for weights on a backend other than "eager".
        """
        B, T, _ = hidden.shape
        q, k, v = (
            project(hidden).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
            for project in (self.query, self.key, self.value)
        )
        dropout, weights = self.dropout if self.training else 0.0, None
        if output_attentions:
            if self.choice.backend != "eager":
                raise UnsupportedFeature(
                    f"output_attentions=True: attention backend {self.choice.backend!r} never "
                    'forms the weights; only "eager" does. Call '
                    'model.set_attn_implementation("eager") first'
                )
            o, weights = attention_with_weights(q, k, v, AttentionSpec(mask, self.scaling, dropout))
        else:
            o = attention(
                q, k, v, mask, scale=self.scaling, dropout=dropout, implementation=self.choice
            )
        return o.reshape(B, T, -1), weights

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"


class BertOutput(nn.Module):
    """Projection, dropout, and the norm of the sum with what came in."""

    def __init__(self, config: BertConfig, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(B, T, hidden) of hidden (B, T, size) and residual (B, T, hidden)."""
        return self.LayerNorm(self.dropout(self.dense(hidden)), residual)[0]


class BertAttention(nn.Module):
    """Self-attention and its output; the inner module is called `self` in checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(
        self, hidden: Tensor, mask: Mask, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The normed sum (B, T, hidden), and the weights where they are asked for."""
        attended, weights = self.self(hidden, mask, output_attentions)
        return self.output(attended, hidden), weights


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

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)
        self.chunk = config.chunk_size_feed_forward
        self.checkpointing: dict[str, Any] | None = None

    def forward(
        self, hidden: Tensor, mask: Mask, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, hidden), and the attention weights where they are asked for.

        With chunk_size_feed_forward > 0 the MLP takes that many tokens at a time.
        """
        attended, weights = self.attention(hidden, mask, output_attentions)
        if self.chunk == 0:
            return self.output(self.intermediate(attended), attended), weights
        pieces = [self.output(self.intermediate(x), x) for x in attended.split(self.chunk, dim=1)]
        return torch.cat(pieces, dim=1), weights


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, mask: Mask, output_attentions: bool, kept: frozenset[int]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """The last state, those numbered in `kept` from the embeddings on, and all weights."""
        states: list[Any] = [hidden if 0 in kept else None]
        attentions: tuple[Tensor, ...] | None = () if output_attentions else None
        for i, layer in enumerate(self.layer, 1):
            hidden, weights = run_layer(layer, hidden, mask, output_attentions)
            states.append(hidden if i in kept else None)
            if attentions is not None:
                attentions += (weights,)
        return hidden, tuple(states) if kept else None, attentions


class BertPooler(nn.Module):
    """tanh of a projection of the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (B, hidden)."""
        return torch.tanh(self.dense(hidden[:, 0]))
