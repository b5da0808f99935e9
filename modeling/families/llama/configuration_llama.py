"""LlamaConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.errors import ConfigError


class LlamaConfig(DecoderConfig):
    """Configuration of a Llama model; the defaults are those of Llama 7B."""

    model_type: ClassVar[str] = "llama"
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    pretraining_tp: int = 1

    def validate(self) -> None:
        """As every decoder; `pretraining_tp` is a field of old files that must not ask for more."""
        super().validate()
        if self.pretraining_tp != 1:
            raise ConfigError(
                f"pretraining_tp={self.pretraining_tp} is not supported; the only value allowed is "
                "1, which gives the same model in one piece"
            )
