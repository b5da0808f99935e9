"""GptOssConfig: HF's fields and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from swathe.modeling.config_fields import Range, positive
from swathe.modeling.decoder_config import FULL, SLIDING, LayerTypesConfig
from swathe.modeling.moe_decoder import MoeConfig

_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOssConfig(MoeConfig, LayerTypesConfig):
    """Configuration of a gpt-oss model; the defaults are those of gpt-oss-120b.

    Every other layer, from the first on, sees `sliding_window` keys, unless `layer_types` says
    otherwise.
    """

    model_type: ClassVar[str] = "gpt_oss"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {"embed_tokens": "embedding_rowwise"}
    ranges: ClassVar[dict[str, Range]] = {
        "num_local_experts": (1, 2**16),
        "swiglu_alpha": positive(),
        "swiglu_limit": positive(),
    }

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_bias: bool = True
    sliding_window: int | None = 128
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        """Rope parameters; without any, gpt-oss's yarn, and theta 150000 where none is given."""
        given = _ROPE if parameters is None else parameters
        return super().rope_spelled(given, {"rope_theta": 150_000.0, **legacy})

    def pattern(self, layer_idx: int) -> str:
        """Sliding and full in turn."""
        return FULL if layer_idx % 2 else SLIDING
