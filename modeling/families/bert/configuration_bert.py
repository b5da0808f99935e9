"""BertConfig: HF's fields and defaults."""

from __future__ import annotations

from typing import Any, ClassVar

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_fields import Range, positive
from swathe.modeling.errors import ConfigError
from swathe.modeling.layers.activations import ACT2FN


class BertConfig(PreTrainedConfig):
    """Configuration of a BERT; the defaults are those of bert-base-uncased.

    `is_decoder` makes attention causal, `add_cross_attention` reads an encoder's states as well.
    """

    model_type: ClassVar[str] = "bert"
    ranges: ClassVar[dict[str, Range]] = {
        "vocab_size": (1, 2**24),
        "hidden_size": (1, 2**20),
        "num_hidden_layers": (1, 4096),
        "num_attention_heads": (1, 2**16),
        "intermediate_size": (1, 2**20),
        "hidden_dropout_prob": (0, 1),
        "attention_probs_dropout_prob": (0, 1),
        "max_position_embeddings": (1, 2**30),
        "type_vocab_size": (1, 2**20),
        "initializer_range": (0, 1),
        "layer_norm_eps": positive(),
        "classifier_dropout": (0, 1),
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """The key of files before transformers 5 that says how positions enter."""
        return ("position_embedding_type",)

    @classmethod
    def from_legacy(
        cls, values: dict[str, Any], legacy: dict[str, Any], *, wins: bool = False
    ) -> dict[str, Any]:
        """The values as they are; "absolute" says what is always so, anything else raises."""
        kind = legacy["position_embedding_type"]
        if kind != "absolute":
            raise ConfigError(
                f"position_embedding_type={kind!r} is not supported; allowed: 'absolute', learned "
                "positions that are added to the embeddings. For the relative kinds see "
                "modeling/examples/dummy_bert"
            )
        return values

    def validate(self) -> None:
        """Ranges, then what must divide what, then names, token ids and what is not supported."""
        super().validate()
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}; change one of them"
            )
        if self.hidden_act not in ACT2FN:
            raise ConfigError(
                f"hidden_act={self.hidden_act!r}{did_you_mean(self.hidden_act, ACT2FN)}; allowed: "
                f"{sorted(ACT2FN)}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary; allowed: None or 0 "
                f"to vocab_size - 1 = {self.vocab_size - 1}"
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError(
                "add_cross_attention=True needs is_decoder=True: only a decoder reads the states "
                "of an encoder; set is_decoder=True as well, or leave add_cross_attention out"
            )
