"""Phi3Config: HF's fields and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from swathe.modeling.config_fields import Range
from swathe.modeling.decoder_config import DecoderConfig


class Phi3Config(DecoderConfig):
    """Configuration of a Phi-3 model; the defaults are those of Phi-3-mini-4k.

    `original_max_position_embeddings` is what rope type "longrope" was trained at before. Dropout:
    `resid_pdrop` after attention and MLP; `embd_pdrop` is a field of the files that nothing reads.
    """

    model_type: ClassVar[str] = "phi3"
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        "layers.*.self_attn.qkv_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_up_proj": "colwise_gather_output",
        "layers.*.mlp.down_proj": "rowwise_split_input",
    }
    absent_when_derived: ClassVar[tuple[str, ...]] = ("head_dim",)
    partial_rotary: ClassVar[bool] = True
    rope_aliases: ClassVar[Mapping[str, str]] = {"su": "longrope", "yarn": "longrope"}
    ranges: ClassVar[dict[str, Range]] = {
        "sliding_window": (1, 2**30),
        "original_max_position_embeddings": (1, 2**30),
        "resid_pdrop": (0, 1),
        "embd_pdrop": (0, 1),
    }

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    # as transformers: short or long factors by the tokens of a forward
    rope_length: int | Literal["per_forward"] | None = "per_forward"

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """Rotary keys of older files, but for the one that is a field here."""
        return ("rope_theta", "partial_rotary_factor")

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        """Rope parameters with the share of a head that is turned, as Phi-3's files have it."""
        return {"partial_rotary_factor": 1.0, **super().rope_spelled(parameters, legacy)}

    @classmethod
    def _prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        # the rope parameters of older files leave their original length to the field beside them
        for name in ("rope_parameters", "rope_scaling"):
            given = values.get(name)
            if isinstance(given, Mapping) and given.get("rope_type", given.get("type")) in (
                "longrope",
                *cls.rope_aliases,
            ):
                field = "original_max_position_embeddings"
                default = values.get(field, cls.original_max_position_embeddings)
                values = {**values, name: {field: default, **given}}
        return super()._prepared(values)

    def window(self, layer_idx: int) -> int | None:
        """The sliding window, the same in all layers."""
        return self.sliding_window
