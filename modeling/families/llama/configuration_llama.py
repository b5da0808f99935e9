"""LlamaConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.errors import ConfigError


class LlamaConfig(DecoderConfig):
    """Configuration of a Llama model; the defaults are those of Llama 7B."""

    model_type: ClassVar[str] = "llama"

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    pretraining_tp: int = 1

    def validate(self) -> None:
        """As every decoder; `pretraining_tp` is a field of old files that must not ask for more."""
        super().validate()
        if self.pretraining_tp != 1:
            raise ConfigError(
                f"pretraining_tp={self.pretraining_tp} is not supported; the only value allowed is "
                "1, which gives the same model in one piece"
            )
