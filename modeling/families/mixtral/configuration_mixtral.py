"""MixtralConfig: HF's fields and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from swathe.modeling.config_fields import Range
from swathe.modeling.moe_decoder import MoeConfig


class MixtralConfig(MoeConfig):
    """Configuration of a Mixtral model; the defaults are those of Mixtral 8x7B."""

    model_type: ClassVar[str] = "mixtral"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    ranges: ClassVar[dict[str, Range]] = {
        "sliding_window": (1, 2**30),
        "num_local_experts": (1, 2**16),
        "router_jitter_noise": (0, 1),
    }

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    num_local_experts: int = 8
    router_jitter_noise: float = 0.0

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        """Rope parameters, whose theta is 1e6 where none is given."""
        return super().rope_spelled(parameters, {"rope_theta": 1_000_000.0, **legacy})

    def to_dict(self) -> dict[str, Any]:
        """As every decoder; head_dim is in the files as it was given, None as a rule."""
        return {**super().to_dict(), "head_dim": vars(self).get("head_dim")}

    def window(self, layer_idx: int) -> int | None:
        """The sliding window, the same in all layers."""
        return self.sliding_window
