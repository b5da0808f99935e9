"""Llama: embeddings, pre-norm decoder layers, a final norm, and a language-model head.

Parameter names are the checkpoint's. Positions are rotary, keys and values are shared by groups of
query heads, the MLP is gated: this is what modeling/decoder.py builds where a family says no more.
"""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.families.llama.configuration_llama import LlamaConfig


class LlamaPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: LlamaConfig
    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig


class LlamaModel(LlamaPreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class LlamaForCausalLM(LlamaPreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = LlamaModel
