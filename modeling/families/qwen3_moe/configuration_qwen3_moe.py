"""Qwen3MoeConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config_fields import Range
from swathe.modeling.moe_decoder import MoeConfig


class Qwen3MoeConfig(MoeConfig):
    """Configuration of a Qwen3 mixture of experts; the defaults are HF's.

    Every `decoder_sparse_step`-th layer that is not in `mlp_only_layers` has experts, of
    `moe_intermediate_size` features; the others have an MLP of `intermediate_size`.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    absent_when_derived: ClassVar[tuple[str, ...]] = ("head_dim",)
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        **(MoeConfig.base_model_tp_plan or {}),
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    ranges: ClassVar[dict[str, Range]] = {
        "sliding_window": (1, 2**30),
        "num_experts": (1, 2**16),
        "moe_intermediate_size": (1, 2**20),
        "decoder_sparse_step": (1, 4096),
    }

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] | None = None

    def __post_init__(self) -> None:
        # as HF: a window that is not used is none, and no list of layers an empty one
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        super().__post_init__()

    @property
    def experts(self) -> int:
        """How many experts a layer has."""
        return self.num_experts

    def window(self, layer_idx: int) -> int | None:
        """The sliding window, the same in all layers."""
        return self.sliding_window

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts."""
        assert self.mlp_only_layers is not None
        routed = (layer_idx + 1) % self.decoder_sparse_step == 0
        return routed and layer_idx not in self.mlp_only_layers
