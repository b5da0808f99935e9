"""The bases of decoder-only families: a body over pre-norm layers, and a language model on it.

A family's file says what is its own: the layer class, how embeddings are scaled, which rotation a
layer takes. What all share is here: inputs checked, masks and positions made once a forward, the
residual stream, captured states, the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cache_protocol import LayerMasks
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.forward import (
    States,
    captures,
    check_cache,
    checked_embeddings,
    keep_logits,
    mask_and_positions,
    tell_of_long_texts,
    wanted_states,
    wants,
)
from swathe.modeling.generation.generate import GenerationMixin
from swathe.modeling.gradients import run_layer
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.layers.embedding import RotaryEmbedding, Rotation
from swathe.modeling.layers.head_norm import HeadNorm
from swathe.modeling.layers.linear import Linear
from swathe.modeling.layers.moe import Experts, Router
from swathe.modeling.losses import causal_lm_loss, linear_causal_lm_loss
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from swathe.modeling.packing import Packing
from swathe.modeling.recorded import run_recorded


@dataclass
class Encoded:
    """What a body finds: normed states, its cache, and what was captured on the way."""

    attentions: list[Tensor] | None
    hidden: Tensor | None = None
    cache: DynamicCache | StaticCache | None = None
    states: tuple[Tensor, ...] | None = None
    router_logits: list[Tensor] = field(default_factory=list)


class DecoderPreTrainedModel(PreTrainedModel):
    """What the body and the models with a head have in common."""

    config: DecoderConfig
    config_class: ClassVar[type[PreTrainedConfig]] = DecoderConfig
    base_model_prefix: ClassVar[str] = "model"
    embed_path: ClassVar[str] = "model.embed_tokens"
    _no_split_modules: ClassVar[tuple[str, ...]] = ("DecoderLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HeadNorm):
            module.reset_parameters()
        elif isinstance(module, Experts | Router):
            module.reset_parameters(std)
        elif isinstance(module, SelfAttention) and module.sinks is not None:
            module.sinks.normal_(0.0, std)


class DecoderModel(DecoderPreTrainedModel):
    """The body: token ids to normed hidden states."""

    embed_path: ClassVar[str] = "embed_tokens"
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self.make_embedding(config)
        self.layers = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = self.layer_class.make_norm(config)
        self.rotary_emb = self.make_rotary(config)

    @staticmethod
    def make_embedding(config: DecoderConfig) -> nn.Embedding:
        """The module that turns ids into vectors."""
        return nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)

    @staticmethod
    def make_rotary(config: DecoderConfig) -> nn.Module:
        """The module whose output `rotations` hands to the layers."""
        return RotaryEmbedding.of(config)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Mapping[str, Rotation]:
        """The rotation of each layer type, made once a forward."""
        return dict.fromkeys(self.config.layer_type_names, self.rotary_emb(positions, dtype))

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | Mask | None,
        position_ids: Tensor | None,
        past_key_values: DynamicCache | StaticCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: States,
        packing: Packing,
    ) -> Encoded:
        """All that a forward finds; arguments as `forward`."""
        # as transformers: a configuration with fewer layers runs the first ones
        layers: list[Any] = list(self.layers)[: self.config.num_hidden_layers]
        kept = wanted_states(self, output_hidden_states, len(layers))
        capture = captures(self, output_attentions)
        found = Encoded([] if capture else None)
        hidden = checked_embeddings(self.embed_tokens, input_ids, inputs_embeds)
        cache = found.cache = check_cache(self, past_key_values, use_cache)
        mask, positions = mask_and_positions(
            attention_mask, position_ids, hidden, cache, past_key_values is None, packing
        )
        if position_ids is None and not packing:
            tell_of_long_texts(self, hidden, cache)
        rotations = self.rotations(positions, hidden.dtype)
        masks: dict[tuple[int | None, int], Mask] = {(None, 0): mask}
        foreign = LayerMasks.of(cache, hidden)
        residual: Tensor | None = None
        states: list[Any] = [None] * (len(layers) + 1)
        if not (kept or capture):
            recorded = run_recorded(self, layers, hidden, rotations, mask, cache)
            if recorded is not None:
                found.hidden, _ = self.norm(*recorded)
                return found
        for i, layer in enumerate(layers):
            if i in kept:
                hidden, residual = (hidden if residual is None else hidden + residual), None
                states[i] = hidden
            rotation = rotations[layer.layer_type]
            sees = layer.window, 0 if foreign is not None else passed_by(layer, cache)
            if sees not in masks:
                masks[sees] = narrowed(mask, *sees)
            seen = masks[sees] if foreign is None else foreign.fit(masks[sees], i)
            stream = (hidden, residual, rotation, seen, cache)
            hidden, residual, weights, routed = run_layer(layer, *stream, capture)
            if found.attentions is not None and weights is not None:
                found.attentions.append(weights)
            if routed is not None:
                found.router_logits.append(routed)
        assert residual is not None
        found.hidden, _ = self.norm(hidden, residual)
        if len(layers) in kept:
            states[-1] = found.hidden
        found.states = tuple(states) if kept else None
        return found

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | StaticCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        **packing: Unpack[Packing],
    ) -> BaseModelOutputWithPast | tuple[object, ...]:
        """Hidden states (B, T, hidden) of ids (B, T), or of vectors in `inputs_embeds`.

        `attention_mask` takes every form in modeling/masks.py and never loses causality; several
        documents in a row are told apart as modeling/packing.py says. Layers with a sliding window
        apply it on top.
        `use_cache` defaults to the configuration's in eval mode and to False in training;
        attention weights exist on backend "eager" only, elsewhere asking for them raises, unless
        `config.attn_capture` has them recomputed.
        """
        found = self.encode(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            packing,
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=found.hidden,
            past_key_values=found.cache,
            hidden_states=found.states,
            attentions=None if found.attentions is None else tuple(found.attentions),
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class CausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The body and a head over the vocabulary, its weight tied where the configuration says so."""

    body_class: ClassVar[type[DecoderModel]] = DecoderModel
    head_path: ClassVar[str] = "lm_head"
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.body_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @auto_docstring
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
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **packing: Unpack[Packing],
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """Logits (B, T, V), of the last `logits_to_keep` tokens only where that is above 0.

        With `labels` (B, T) the loss of predicting each next token, see losses.causal_lm_loss. In
        training with `loss_implementation` set, the loss never forms the logits: they are None,
        unless `logits_to_keep` asks for some.
        Other arguments as the body's forward.
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
        logits, loss = self.predict(
            body.last_hidden_state, labels, logits_to_keep, num_items_in_batch, shift_labels
        )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()

    def predict(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        shift_labels: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss of hidden states; one of them is None, as `forward` says."""
        asked = labels is not None or shift_labels is not None
        given: dict[str, Any] = {
            "num_items_in_batch": num_items_in_batch,
            "shift_labels": shift_labels,
        }
        all_tokens = isinstance(logits_to_keep, int) and logits_to_keep == 0
        fused = self.config.loss_implementation if asked and self.training and all_tokens else None
        softcap = self.config.logit_softcap
        if fused is not None:
            return None, linear_causal_lm_loss(
                self.lm_head, hidden, labels, **given, softcap=softcap, implementation=fused
            )
        logits = self.lm_head(keep_logits(hidden, logits_to_keep))
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        return logits, causal_lm_loss(logits, labels, **given) if asked else None


def passed_by(layer: Any, cache: DynamicCache | StaticCache | None) -> int:
    """How many of the first tokens a layer's cache will not hand out any more."""
    return 0 if cache is None else cache.get_mask_sizes(0, layer.self_attn.layer_idx)[1]


def narrowed(mask: Mask, window: int, passed: int = 0) -> Mask:
    """A mask with a sliding window on top of what it shows, over keys from `passed` on."""
    mask = mask.from_key(passed)
    width = window if mask.window is None else min(window, mask.window)
    # past an end, or under a mask, the keys that a row was promised may lie before its window
    sees_itself = mask.causal and mask.interval and mask.end is None
    empty = mask.rows_may_be_empty or not sees_itself
    return replace(mask, window=width, rows_may_be_empty=empty)
