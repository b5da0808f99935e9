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

FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderConfig(PreTrainedConfig):
    """A decoder-only language model with rotary positions and grouped key and value heads.

    `head_dim` and `num_key_value_heads` left at None follow the fields they are derived from. What
    families spell in their own way (activation, biases, scale, windows) is read through properties.
    `rope_length` is the length that rope types "dynamic" and "longrope" turn for; it says how a
    model runs, and no file has it: modeling/layers/embedding.py. Of a family, `partial_rotary` says
    that its attention honours partial_rotary_factor, `rope_aliases` how its files name rope types.
    """

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
    partial_rotary: ClassVar[bool] = False
    rope_aliases: ClassVar[Mapping[str, str]] = ALIASES
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    absent_when_derived: ClassVar[tuple[str, ...]] = ()
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
    attention_dropout: float = 0.0

    @property
    def activation(self) -> str:
        """The MLP's activation."""
        return getattr(self, "hidden_act", "silu")

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Whether the projections into attention, and the one out of it, have biases."""
        given = bool(getattr(self, "attention_bias", False))
        return given, given

    @property
    def mlp_biases(self) -> bool:
        """Whether the MLP's projections have biases."""
        return bool(getattr(self, "mlp_bias", False))

    @property
    def scaling(self) -> float:
        """What attention scores are multiplied by."""
        assert self.head_dim is not None
        return self.head_dim**-0.5

    @property
    def attention_softcap(self) -> float | None:
        """The softcap of attention scores."""
        return None

    @property
    def logit_softcap(self) -> float | None:
        """The softcap of the language model's logits."""
        return None

    @property
    def layer_type_names(self) -> tuple[str, ...]:
        """Every layer type that the model may have."""
        return (FULL,)

    def layer_type(self, layer_idx: int) -> str:
        """The type of one layer."""
        return FULL

    def window(self, layer_idx: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None for all before it."""
        return None

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

    def to_dict(self) -> dict[str, Any]:
        """As every configuration, less the derived values that the family's files do not have."""
        values = super().to_dict()
        for name in self.absent_when_derived:
            if name not in vars(self):
                del values[name]
        return values

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
            raise ConfigError(
                f"head_dim={self.head_dim} must be even for rotary embedding; give an even one, or "
                f"leave it out where hidden_size={self.hidden_size} / num_attention_heads={heads} "
                "is even"
            )
        rope = self.rope_spelled(self.rope_parameters, {})
        check_fits(rope, self.head_dim, partial=self.partial_rotary)
        if self.chunk_size_feed_forward:
            raise ConfigError(
                f"chunk_size_feed_forward={self.chunk_size_feed_forward}: the MLPs of decoders are "
                "not cut in chunks; the only value allowed is 0. BERT honours others"
            )
        if self.activation not in ACTIVATIONS:
            field = next(n for n in ("hidden_activation", "hidden_act") if n in vars(self))
            raise ConfigError(
                f"{field}={self.activation!r}{did_you_mean(self.activation, ACTIVATIONS)}; "
                f"allowed: {list(ACTIVATIONS)}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary; allowed: None or 0 "
                f"to vocab_size - 1 = {self.vocab_size - 1}"
            )


def refuse_bidirectional(asked: bool | None) -> None:
    """Raise ConfigError where a decoder's configuration asks for attention to later tokens."""
    if asked:
        raise ConfigError(
            "use_bidirectional_attention=True is not supported by this causal family; the values "
            "allowed are None and False. For attention to later tokens use an encoder, such as bert"
        )


class LayerTypesConfig(DecoderConfig):
    """A decoder some of whose layers see a sliding window only, as `layer_types` lists them.

    `layer_types` left at None follows the family's pattern, `pattern`.
    """

    ranges: ClassVar[dict[str, Range]] = {"sliding_window": (1, 2**30)}

    sliding_window: int | None = 4096
    layer_types: list[str] | None = derived(
        lambda c: [c.pattern(i) for i in range(c.num_hidden_layers)]
    )

    def pattern(self, layer_idx: int) -> str:
        """The family's own choice of layer types."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern of layer types")

    @property
    def layer_type_names(self) -> tuple[str, ...]:
        """Both types, whether or not a layer has them."""
        return FULL, SLIDING

    def layer_type(self, layer_idx: int) -> str:
        """The type of one layer."""
        assert self.layer_types is not None
        return self.layer_types[layer_idx]

    def window(self, layer_idx: int) -> int | None:
        """The sliding window, in layers that have it."""
        return self.sliding_window if self.layer_type(layer_idx) == SLIDING else None

    def validate(self) -> None:
        """As every decoder; then that each layer has a known type, and sliding ones a window."""
        super().validate()
        types = self.layer_types
        assert types is not None
        for name in types:
            if name not in (FULL, SLIDING):
                raise ConfigError(
                    f"layer_types has {name!r}{did_you_mean(name, (FULL, SLIDING))}; allowed: "
                    f"{[FULL, SLIDING]}"
                )
        if len(types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types has {len(types)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}; give one a layer, or None for the family's pattern"
            )
        if SLIDING in types and self.sliding_window is None:
            raise ConfigError(
                "sliding_window=None, but layer_types has 'sliding_attention'; give a window of 1 "
                "or more, or make every layer 'full_attention'"
            )
