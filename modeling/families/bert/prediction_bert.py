"""BERT's prediction of words: what its masked language model puts on the body."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.layers.activations import ACT2FN
from swathe.modeling.layers.layer_norm import LayerNorm


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and norm before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, residual=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden)."""
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden)))


class BertLMPredictionHead(nn.Module):
    """The transform and a projection whose bias has a second name, which is the one stored."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to logits (B, T, V)."""
        return self.decoder(self.transform(hidden))


class BertOnlyMLMHead(nn.Module):
    """The prediction head under its name in checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to logits (B, T, V)."""
        return self.predictions(hidden)
