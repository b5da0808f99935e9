"""Token embeddings times a constant: Gemma's sqrt(hidden_size)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from swathe.modeling.config_fields import DTYPES
from swathe.modeling.decoder_config import DecoderConfig


class ScaledEmbedding(nn.Embedding):
    """Rows of the table times `scale`, which is rounded to the table's dtype first, as in HF."""

    def __init__(self, ids: int, features: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(ids, features, padding_idx)
        self.scale = {d: torch.tensor(scale, dtype=d, device="cpu").item() for d in DTYPES.values()}

    @classmethod
    def of(cls, config: DecoderConfig) -> Self:
        """A model's embeddings times sqrt(hidden_size)."""
        hidden = config.hidden_size
        return cls(config.vocab_size, hidden, config.pad_token_id, hidden**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """(B, T) to (B, T, features)."""
        return super().forward(input) * self.scale[self.weight.dtype]
