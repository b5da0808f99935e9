"""Gemma2Config: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config_fields import Range, positive
from swathe.modeling.decoder_config import FULL, SLIDING, LayerTypesConfig, refuse_bidirectional


class Gemma2Config(LayerTypesConfig):
    """Configuration of a Gemma 2 model; the defaults are HF's.

    Every other layer, from the first on, sees `sliding_window` keys, unless `layer_types` says
    otherwise. Attention scores are scaled by query_pre_attn_scalar^(-1/2).
    """

    model_type: ClassVar[str] = "gemma2"
    ranges: ClassVar[dict[str, Range]] = {
        "query_pre_attn_scalar": positive(),
        "attn_logit_softcapping": positive(),
        "final_logit_softcapping": positive(),
    }

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: bool | None = None
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    def pattern(self, layer_idx: int) -> str:
        """Sliding and full in turn."""
        return FULL if layer_idx % 2 else SLIDING

    @property
    def activation(self) -> str:
        """The MLP's activation."""
        return self.hidden_activation

    @property
    def scaling(self) -> float:
        """What attention scores are multiplied by."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def attention_softcap(self) -> float | None:
        """The softcap of attention scores."""
        return self.attn_logit_softcapping

    @property
    def logit_softcap(self) -> float | None:
        """The softcap of the language model's logits."""
        return self.final_logit_softcapping

    def validate(self) -> None:
        """As every decoder with layer types; attention is causal."""
        super().validate()
        refuse_bidirectional(self.use_bidirectional_attention)
