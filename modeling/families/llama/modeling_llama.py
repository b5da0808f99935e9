"""Llama: embeddings, pre-norm decoder layers, a final norm, and a language-model head.

Parameter names are the checkpoint's. Positions are rotary, keys and values are shared by groups of
query heads, the MLP is gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.forward import (
    check_cache,
    checked_embeddings,
    keep_logits,
    mask_and_positions,
    wants,
)
from swathe.modeling.generation.generate import GenerationMixin
from swathe.modeling.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from swathe.modeling.layers.decoder import DecoderLayer, run_layer
from swathe.modeling.layers.embedding import RotaryEmbedding
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.losses import causal_lm_loss, linear_causal_lm_loss
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from swathe.modeling.packing import Packing


class LlamaPreTrainedModel(PreTrainedModel):
    """What the body and the models with a head have in common."""

    config: LlamaConfig
    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig
    base_model_prefix: ClassVar[str] = "model"
    embed_path: ClassVar[str] = "model.embed_tokens"
    _no_split_modules: ClassVar[tuple[str, ...]] = ("DecoderLayer",)


class LlamaModel(LlamaPreTrainedModel):
    """The body: token ids to normed hidden states."""

    embed_path: ClassVar[str] = "embed_tokens"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.rope_parameters is not None and config.head_dim is not None
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_parameters, config.head_dim)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | StaticCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packing: Unpack[Packing],
    ) -> BaseModelOutputWithPast | tuple[object, ...]:
        """Hidden states (B, T, hidden) of ids (B, T), or of vectors in `inputs_embeds`.

        `attention_mask` takes every form in modeling/masks.py and never loses causality; several
        documents in a row are told apart as modeling/packing.py says.
        `use_cache` defaults to the configuration's in eval mode and to False in training;
        attention weights exist on backend "eager" only, elsewhere asking for them raises.
        """
        with_weights = wants(self, "output_attentions", output_attentions)
        with_states = wants(self, "output_hidden_states", output_hidden_states)
        hidden = checked_embeddings(self.embed_tokens, input_ids, inputs_embeds)
        cache = check_cache(self, past_key_values, use_cache)
        mask, positions = mask_and_positions(
            attention_mask, position_ids, hidden, cache, past_key_values is None, packing
        )
        rotation = self.rotary_emb(positions, hidden.dtype)

        residual: Tensor | None = None
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        for layer in self.layers:
            if with_states:
                hidden, residual = (hidden if residual is None else hidden + residual), None
                states.append(hidden)
            hidden, residual, weights = run_layer(
                layer, hidden, residual, rotation, mask, cache, with_weights
            )
            if weights is not None:
                attentions.append(weights)
        assert residual is not None
        hidden, _ = self.norm(hidden, residual)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if with_states else None,
            attentions=tuple(attentions) if with_weights else None,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """The body and a head over the vocabulary, its weight tied where the configuration says so."""

    head_path: ClassVar[str] = "lm_head"
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | StaticCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **packing: Unpack[Packing],
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """Logits (B, T, V), of the last `logits_to_keep` tokens only where that is above 0.

        With `labels` (B, T) the loss of predicting each next token, see losses.causal_lm_loss. In
        training with `loss_implementation` set, the loss never forms the logits: they are None.
        Other arguments as LlamaModel.forward.
        """
        body = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            **packing,
        )
        hidden, asked = body.last_hidden_state, labels is not None or shift_labels is not None
        given: dict[str, Any] = {
            "num_items_in_batch": num_items_in_batch,
            "shift_labels": shift_labels,
        }
        fused = self.config.loss_implementation if asked and self.training else None
        logits, loss = None, None
        if fused is not None:
            loss = linear_causal_lm_loss(
                self.lm_head, hidden, labels, **given, implementation=fused
            )
        else:
            logits = self.lm_head(keep_logits(hidden, logits_to_keep))
            loss = causal_lm_loss(logits, labels, **given) if asked else None
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class LlamaForSequenceClassification(ForSequenceClassification, LlamaPreTrainedModel):
    """The body and a classifier of sequences."""

    body_class = LlamaModel


class LlamaForTokenClassification(ForTokenClassification, LlamaPreTrainedModel):
    """The body and a classifier of tokens."""

    body_class = LlamaModel


class LlamaForQuestionAnswering(ForQuestionAnswering, LlamaPreTrainedModel):
    """The body and two logits a token; HF stores the body of this one as `transformer`."""

    base_model_prefix: ClassVar[str] = "transformer"
    body_class = LlamaModel
    _key_renames: ClassVar[Mapping[str, str]] = {r"^model\.": "transformer."}
