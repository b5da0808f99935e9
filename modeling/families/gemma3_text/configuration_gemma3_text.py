"""Gemma3TextConfig: HF's fields and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from swathe.modeling.config_fields import Range, positive
from swathe.modeling.decoder_config import FULL, SLIDING, LayerTypesConfig, refuse_bidirectional
from swathe.modeling.errors import ConfigError
from swathe.modeling.rope import normalised_by_layer

_THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
_PATTERN = 6


class Gemma3TextConfig(LayerTypesConfig):
    """Configuration of a Gemma 3 text model; the defaults are HF's.

    Every sixth layer sees everything, the others `sliding_window` keys, unless `layer_types` or an
    older file's `sliding_window_pattern` says otherwise. Either layer type has a rotation of its
    own: rope_parameters={"full_attention": {...}, "sliding_attention": {...}}.
    """

    model_type: ClassVar[str] = "gemma3_text"
    base_model_tp_plan: ClassVar[dict[str, str] | None] = {
        **(LayerTypesConfig.base_model_tp_plan or {}),
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }
    ranges: ClassVar[dict[str, Range]] = {
        "query_pre_attn_scalar": positive(),
        "final_logit_softcapping": positive(),
    }

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: bool | None = False
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """Keys of older files: a theta for either layer type, and the layer types' period."""
        return ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        """Rope parameters by layer type; those of older files are the full layers'."""
        beside = {
            layer_type: {"rope_theta": legacy.get(key, default)}
            for layer_type, (key, default) in _THETAS.items()
        }
        if isinstance(parameters, Mapping) and parameters and not parameters.keys() & set(_THETAS):
            parameters = {FULL: parameters}
        return normalised_by_layer(parameters, tuple(_THETAS), beside)

    @classmethod
    def from_legacy(
        cls, values: dict[str, Any], legacy: dict[str, Any], *, wins: bool = False
    ) -> dict[str, Any]:
        """Rope parameters and layer types with the keys of older files folded in."""
        parameters = values.get("rope_parameters")
        if wins:
            parameters = cls.rope_spelled(parameters, {})
            for layer_type, (key, _) in _THETAS.items():
                if key in legacy:
                    parameters[layer_type]["rope_theta"] = legacy[key]
        period = legacy.get("sliding_window_pattern")
        if period is not None and (wins or values.get("layer_types") is None):
            if not isinstance(period, int) or period < 1:
                raise ConfigError(
                    f"sliding_window_pattern={period!r}; it must be a whole number from 1, every "
                    "how many layers one sees everything"
                )
            layers = values.get("num_hidden_layers", cls.num_hidden_layers)
            values = {**values, "layer_types": [_type_at(i, period) for i in range(layers)]}
        return {**values, "rope_parameters": cls.rope_spelled(parameters, legacy)}

    def pattern(self, layer_idx: int) -> str:
        """Five sliding layers, then a full one."""
        return _type_at(layer_idx, _PATTERN)

    @property
    def rope_theta(self) -> float:
        """The base of the full layers' rotary frequencies."""
        assert self.rope_parameters is not None
        return self.rope_parameters[FULL]["rope_theta"]

    @property
    def activation(self) -> str:
        """The MLP's activation."""
        return self.hidden_activation

    @property
    def scaling(self) -> float:
        """What attention scores are multiplied by."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def logit_softcap(self) -> float | None:
        """The softcap of the language model's logits."""
        return self.final_logit_softcapping

    def validate(self) -> None:
        """As every decoder with layer types; what HF has a field for and does not do is refused."""
        super().validate()
        refuse_bidirectional(self.use_bidirectional_attention)
        if self.attn_logit_softcapping is not None:
            raise ConfigError(
                f"attn_logit_softcapping={self.attn_logit_softcapping}: Gemma 3's attention has no "
                "softcap, and transformers ignores this field; the only value allowed is None"
            )


def _type_at(layer_idx: int, period: int) -> str:
    return SLIDING if (layer_idx + 1) % period else FULL
