"""Decoder bases of families whose MLPs are mixtures of experts: router logits and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.config_fields import Range
from swathe.modeling.decoder import CausalLM, DecoderModel
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.errors import ConfigError
from swathe.modeling.forward import States, wants
from swathe.modeling.layers.decoder import DecoderLayer
from swathe.modeling.outputs import ModelOutput, MoeCausalLMOutputWithPast
from swathe.modeling.packing import Packing
from swathe.modeling.router_loss import load_balancing_loss


class MoeConfig(DecoderConfig):
    """Fields of mixtures of experts; `experts` is their number by whatever name a family has."""

    ranges: ClassVar[dict[str, Range]] = {
        "num_experts_per_tok": (1, 2**16),
        "router_aux_loss_coef": (0, 1e6),
    }

    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    @property
    def experts(self) -> int:
        """How many experts a layer has."""
        return self.num_local_experts

    def validate(self) -> None:
        """As every decoder; no token can go to more experts than there are."""
        super().validate()
        if not 1 <= self.num_experts_per_tok <= self.experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} with {self.experts} experts; it "
                f"must be from 1 to {self.experts}"
            )


@dataclass
class MoeModelOutputWithPast(ModelOutput):
    """A body's result; router_logits are (B * T, experts), one for each layer that routes."""

    last_hidden_state: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class MoeLayer(DecoderLayer):
    """A layer whose `mlp` is a block of modeling/layers/moe.py, which returns router logits too."""

    def feed_forward(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts' output, and their router's logits."""
        return self.mlp(normed)


class MoeModel(DecoderModel):
    """The body: token ids to normed hidden states."""

    layer_class: ClassVar[type[DecoderLayer]] = MoeLayer

    @auto_docstring
    def forward(  # type: ignore[override]
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
        output_router_logits: bool | None = None,
        **packing: Unpack[Packing],
    ) -> MoeModelOutputWithPast | tuple[object, ...]:
        """Hidden states (B, T, hidden); with `output_router_logits` those of every layer as well.

        Other arguments as DecoderModel.forward.
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
        routed = wants(self, "output_router_logits", output_router_logits)
        output = MoeModelOutputWithPast(
            last_hidden_state=found.hidden,
            past_key_values=found.cache,
            hidden_states=found.states,
            attentions=None if found.attentions is None else tuple(found.attentions),
            router_logits=tuple(found.router_logits) if routed else None,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class MoeCausalLM(CausalLM):
    """The body and a head over the vocabulary."""

    config: Any

    @auto_docstring
    def forward(  # type: ignore[override]
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **packing: Unpack[Packing],
    ) -> MoeCausalLMOutputWithPast | tuple[object, ...]:
        """Logits and loss as CausalLM.forward.

        With `output_router_logits` also aux_loss, see router_loss.py, which counts no padding of a
        (B, T) mask; config.router_aux_loss_coef times it is added to the loss.
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
            output_router_logits,
            **packing,
        )
        logits, loss = self.predict(
            body.last_hidden_state, labels, logits_to_keep, num_items_in_batch, shift_labels
        )
        aux_loss = None
        if body.router_logits:
            aux_loss = self._balance(body, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            router_logits=body.router_logits,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()

    def _balance(self, body: MoeModelOutputWithPast, mask: Tensor | Mask | None) -> Tensor:
        assert body.router_logits is not None and body.last_hidden_state is not None
        tokens = body.last_hidden_state.shape[:2]
        real = mask if isinstance(mask, torch.Tensor) and mask.shape == tokens else None
        return load_balancing_loss(body.router_logits, self.config.num_experts_per_tok, real)
