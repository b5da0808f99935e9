"""MistralConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config_fields import Range
from swathe.modeling.decoder_config import DecoderConfig


class MistralConfig(DecoderConfig):
    """Configuration of a Mistral model; the defaults are those of Mistral 7B v0.1.

    `sliding_window` is that of every layer; None lets them see everything.
    """

    model_type: ClassVar[str] = "mistral"
    ranges: ClassVar[dict[str, Range]] = {"sliding_window": (1, 2**30)}

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def window(self, layer_idx: int) -> int | None:
        """The sliding window, the same in all layers."""
        return self.sliding_window
