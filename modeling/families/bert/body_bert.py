"""BERT's body: token ids to hidden states, as an encoder or as a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.cross_cache import EncoderDecoderCache
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.bert.decoding_bert import BertCache, caches, check_length, source_of
from swathe.modeling.families.bert.encoder_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertPooler,
)
from swathe.modeling.families.bert.prediction_bert import BertLMPredictionHead
from swathe.modeling.forward import (
    States,
    captures,
    checked_embeddings,
    mask_and_positions,
    positions_after,
    wanted_states,
    wants,
)
from swathe.modeling.layers.layer_norm import LayerNorm
from swathe.modeling.masks import bidirectional_mask
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.outputs import BaseModelOutputWithPoolingAndCrossAttentions

_REFUSED = {
    "head_mask": "to silence a head, zero its columns of attention.output.dense.weight",
    "encoder_hidden_states": "the body of a decoder reads them, and the masked language model",
    "encoder_attention_mask": "the body of a decoder reads it, and the masked language model",
    "past_key_values": "heads read whole texts; a decoder's cache goes to its body",
    "use_cache": "heads read whole texts; a decoder's cache comes from its body",
}


class BertPreTrainedModel(PreTrainedModel):
    """What the body and the models with a head have in common."""

    config: BertConfig
    config_class: ClassVar[type[PreTrainedConfig]] = BertConfig
    base_model_prefix: ClassVar[str] = "bert"
    _no_split_modules: ClassVar[tuple[str, ...]] = ("BertEmbeddings", "BertLayer")
    # in the body by name, but masked language models are saved without one
    _head_parts: ClassVar[tuple[str, ...]] = (r"(^|\.)pooler\.",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward; arguments of HF's that the model has no use for are refused with a reason."""
        for name, reason in _REFUSED.items():
            if name in kwargs and name not in self._arguments:
                raise UnsupportedFeature(f"{type(self).__name__}.forward: no {name}: {reason}")
        return super().__call__(*args, **kwargs)

    @property
    def longest_input(self) -> int:
        """How many tokens have a position."""
        return self.config.max_position_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As every model; LayerNorms change nothing, the bias over the vocabulary is 0."""
        super()._init_weights(module)
        if isinstance(module, LayerNorm):
            module.reset_parameters()
        elif isinstance(module, BertLMPredictionHead):
            module.bias.zero_()


class BertModel(BertPreTrainedModel):
    """The body: token ids to hidden states, and with a pooler to one vector a sequence.

    With `config.is_decoder` tokens see earlier ones only and may be cached; with
    `config.add_cross_attention` as well they read the states of an encoder.
    """

    embed_path: ClassVar[str] = "embeddings.word_embeddings"
    position_embed_path: ClassVar[str] = "embeddings.position_embeddings"
    embeddings_class: ClassVar[type[BertEmbeddings]] = BertEmbeddings
    layer_class: ClassVar[type[BertLayer]] = BertLayer

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = BertEncoder(config, self.layer_class)
        self.pooler = BertPooler(config) if add_pooling_layer else None

    @auto_docstring(past_key_values="a DynamicCache, StaticCache or EncoderDecoderCache (decoders)")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | Mask | None = None,
        past_key_values: BertCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[object, ...]:
        """Hidden states (B, T, hidden) of ids (B, T), or of word vectors in `inputs_embeds`.

        `attention_mask` takes every form in modeling/masks.py. `token_type_ids` and `position_ids`
        are (B, T) or (1, T); without them all types are 0 and positions count from 0, or from the
        cache. Attention weights exist on backend "eager" only, elsewhere asking for them raises,
        unless `config.attn_capture` has them recomputed.
        A decoder without `encoder_hidden_states` (B, S, hidden), and without a cache that has read
        them, passes its cross-attention over, as HF's does.
        Raises ValueError or TypeError for what does not fit, also for more tokens than positions,
        and UnsupportedFeature for a cache or an encoder's states that the model is not made for.
        """
        words = checked_embeddings(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        cache = caches(self, past_key_values, use_cache, encoder_hidden_states)
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        given = (encoder_hidden_states, encoder_attention_mask)
        source = source_of(self.config, *given, words, cache)
        mask, positions = self.place(words, attention_mask, position_ids, own)
        output = self.encoder(
            self.embeddings(words, positions, token_type_ids),
            mask,
            own,
            source,
            captures(self, output_attentions),
            wanted_states(self, output_hidden_states, len(self.encoder.layer)),
        )
        output.past_key_values = cache
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.last_hidden_state)
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()

    def place(
        self,
        words: Tensor,
        attention_mask: Tensor | Mask | None,
        position_ids: Tensor | None,
        cache: DynamicCache | StaticCache | None,
    ) -> tuple[Mask, Tensor]:
        """What the tokens of words (B, T, hidden) see, and their positions (B or 1, T)."""
        check_length(self.longest_input, words, position_ids, cache)
        if self.config.is_decoder:
            return mask_and_positions(attention_mask, position_ids, words, cache, False, {})
        return bidirectional_mask(attention_mask, words), positions_after(0, words, position_ids)
