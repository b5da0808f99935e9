"""GemmaConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import Any, ClassVar

from swathe.modeling.decoder_config import DecoderConfig, refuse_bidirectional


class GemmaConfig(DecoderConfig):
    """Configuration of a Gemma model; the defaults are those of Gemma 7B."""

    model_type: ClassVar[str] = "gemma"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: bool | None = None

    @classmethod
    def _prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        # the first files said "gelu" where the weights were trained with its tanh approximation
        if values.get("hidden_act") == "gelu":
            values = {**values, "hidden_act": "gelu_pytorch_tanh"}
        return super()._prepared(values)

    def validate(self) -> None:
        """As every decoder; attention is causal."""
        super().validate()
        refuse_bidirectional(self.use_bidirectional_attention)
