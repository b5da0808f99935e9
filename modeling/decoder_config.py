"""Fields and checks that all decoder families share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.config import PreTrainedConfig, derived
from swathe.modeling.config_fields import ACTIVATIONS, Range, positive
from swathe.modeling.errors import ConfigError
from swathe.modeling.rope import ALIASES, check_fits, normalised

logger = logging.getLogger(__name__)


class DecoderConfig(PreTrainedConfig):
    """A decoder-only language model with rotary positions and grouped key and value heads.

    `head_dim` and `num_key_value_heads` left at None follow the fields they are derived from.
    `rope_length` is the length that rope types "dynamic" and "longrope" turn for; it says how a
    model runs, and no file has it: modeling/layers/embedding.py. Of a family, `partial_rotary` says
    that its attention honours partial_rotary_factor, `rope_aliases` how its files name rope types.
    """

    partial_rotary: ClassVar[bool] = False
    rope_aliases: ClassVar[Mapping[str, str]] = ALIASES
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    ranges: ClassVar[dict[str, Range]] = {
        "vocab_size": (1, 2**24),
        "hidden_size": (1, 2**20),
        "intermediate_size": (1, 2**20),
        "num_hidden_layers": (1, 4096),
        "num_attention_heads": (1, 2**16),
        "num_key_value_heads": (1, 2**16),
        "head_dim": (1, 2**16),
        "max_position_embeddings": (1, 2**30),
        "rope_length": (1, 2**30),
        "initializer_range": (0, 1),
        "rms_norm_eps": positive(),
        "attention_dropout": (0, 1),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = derived(lambda c: c.num_attention_heads)
    head_dim: int | None = derived(lambda c: c.hidden_size // c.num_attention_heads)
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_length: int | Literal["per_forward"] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """Rotary keys that files before transformers 5 keep at the top level."""
        return ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        """`rope_parameters` as the fields hold them; by layer type in a family that says so."""
        return normalised(parameters, legacy, aliases=cls.rope_aliases)

    @classmethod
    def from_legacy(
        cls, values: dict[str, Any], legacy: dict[str, Any], *, wins: bool = False
    ) -> dict[str, Any]:
        """`rope_parameters` with the top-level rotary keys folded in."""
        parameters = values.get("rope_parameters")
        if wins and isinstance(parameters, dict | None):
            parameters = {**(parameters or {}), **legacy}
        return {**values, "rope_parameters": cls.rope_spelled(parameters, legacy)}

    @classmethod
    def _changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """As every configuration; new rope parameters keep what the weights were trained with."""
        old = values.get("rope_parameters")
        trained = ("rope_theta", "partial_rotary_factor")
        kept = {k: old[k] for k in trained if k in old} if isinstance(old, Mapping) else {}
        for name in ("rope_parameters", "rope_scaling"):
            if name in changes and isinstance(changes[name], Mapping | None):
                changes = {**changes, name: {**kept, **(changes[name] or {})}}
        return super()._changed(values, changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **options: Any) -> Self:
        """As every configuration; a negative pad_token_id, as some files have, means none."""
        pad = values.get("pad_token_id")
        if type(pad) is int and pad < 0:
            logger.warning("pad_token_id=%d in a file is read as None", pad)
            values = {**values, "pad_token_id": None}
        return super().from_dict(values, **options)

    def __post_init__(self) -> None:
        self.rope_parameters = self.rope_spelled(self.rope_parameters, {})
        super().__post_init__()

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies; set it through `rope_parameters`."""
        assert self.rope_parameters is not None
        return self.rope_parameters["rope_theta"]

    def validate(self) -> None:
        """Ranges, then what must divide what, then names and token ids."""
        super().validate()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        assert kv_heads is not None and self.head_dim is not None
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; "
                f"allowed with {heads} heads: {[n for n in range(1, heads + 1) if heads % n == 0]}"
            )
        if "head_dim" not in self.__dict__ and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                "change one of them, or give head_dim"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for rotary embedding")
        rope = self.rope_spelled(self.rope_parameters, {})
        check_fits(rope, self.head_dim, partial=self.partial_rotary)
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act={self.hidden_act!r}{did_you_mean(self.hidden_act, ACTIVATIONS)}; "
                f"allowed: {list(ACTIVATIONS)}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary; allowed: None or 0 "
                f"to vocab_size - 1 = {self.vocab_size - 1}"
            )
