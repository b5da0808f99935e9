"""Qwen3Config: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.decoder_config import FULL, SLIDING, LayerTypesConfig


class Qwen3Config(LayerTypesConfig):
    """Configuration of a Qwen3 model; the defaults are HF's.

    With `use_sliding_window`, layers from `max_window_layers` on see `sliding_window` keys.
    """

    model_type: ClassVar[str] = "qwen3"
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        **(LayerTypesConfig.base_model_tp_plan or {}),
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        # as HF: a window that is not used is none
        if not self.use_sliding_window:
            self.sliding_window = None
        super().__post_init__()

    def pattern(self, layer_idx: int) -> str:
        """Sliding from `max_window_layers` on, where windows are used."""
        windowed = self.sliding_window is not None
        return SLIDING if windowed and layer_idx >= self.max_window_layers else FULL
