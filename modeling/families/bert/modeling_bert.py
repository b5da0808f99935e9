"""BERT and its heads: masked language model, sequence and token classes, answers in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.bert.encoder_bert import BertEmbeddings, BertEncoder, BertPooler
from swathe.modeling.forward import (
    States,
    checked_embeddings,
    positions_after,
    wanted_states,
    wants,
)
from swathe.modeling.heads import answers
from swathe.modeling.layers.activations import ACT2FN
from swathe.modeling.layers.layer_norm import LayerNorm
from swathe.modeling.losses import (
    linear_causal_lm_loss,
    sequence_classification_loss,
    token_loss,
)
from swathe.modeling.masks import bidirectional_mask
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

_REFUSED = {
    "head_mask": "to silence a head, zero its columns of attention.output.dense.weight",
    "encoder_hidden_states": "cross-attention is not supported; leave it out",
    "encoder_attention_mask": "cross-attention is not supported; leave it out",
    "past_key_values": "an encoder sees all tokens at once and has no cache; leave it out",
    "use_cache": "an encoder sees all tokens at once and has no cache; leave it out",
}


class BertPreTrainedModel(PreTrainedModel):
    """What the body and the models with a head have in common."""

    config: BertConfig
    config_class: ClassVar[type[PreTrainedConfig]] = BertConfig
    base_model_prefix: ClassVar[str] = "bert"
    embed_path: ClassVar[str] = "bert.embeddings.word_embeddings"
    position_embed_path: ClassVar[str] = "bert.embeddings.position_embeddings"
    _no_split_modules: ClassVar[tuple[str, ...]] = ("BertEmbeddings", "BertLayer")
    # in the body by name, but masked language models are saved without one
    _head_parts: ClassVar[tuple[str, ...]] = (r"(^|\.)pooler\.",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward; arguments of HF's that an encoder has no use for are refused with a reason."""
        for name, reason in _REFUSED.items():
            if name in kwargs:
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
    """The body: token ids to hidden states, and with a pooler to one vector a sequence."""

    embed_path: ClassVar[str] = "embeddings.word_embeddings"
    position_embed_path: ClassVar[str] = "embeddings.position_embeddings"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[object, ...]:
        """Hidden states (B, T, hidden) of ids (B, T), or of word vectors in `inputs_embeds`.

        `attention_mask` takes every form in modeling/masks.py. `token_type_ids` and `position_ids`
        are (B, T) or (1, T); without them all types are 0 and positions count from 0. Attention
        weights exist on backend "eager" only, elsewhere asking for them raises.
        Raises ValueError or TypeError for what does not fit, also for more tokens than positions.
        """
        words = checked_embeddings(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        if position_ids is None and words.shape[1] > self.longest_input:
            raise ValueError(
                f"the sequences have {words.shape[1]} tokens; the model has positions for "
                f"max_position_embeddings={self.longest_input}. Cut them, or pass position_ids"
            )
        positions = positions_after(0, words, position_ids)
        hidden, states, attentions = self.encoder(
            self.embeddings(words, positions, token_type_ids),
            bidirectional_mask(attention_mask, words),
            wants(self, "output_attentions", output_attentions),
            wanted_states(self, output_hidden_states, len(self.encoder.layer)),
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden),
            hidden_states=states,
            attentions=attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and norm before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, residual=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden)."""
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden)))


class BertLMPredictionHead(nn.Module):
    """The transform and a projection whose bias has a second name, which is the one stored."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to logits (B, T, V)."""
        return self.decoder(self.transform(hidden))


class BertOnlyMLMHead(nn.Module):
    """The prediction head under its name in checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to logits (B, T, V)."""
        return self.predictions(hidden)


class BertForMaskedLM(BertPreTrainedModel):
    """The body and logits over the vocabulary, tied to the embeddings where configured."""

    head_path: ClassVar[str] = "cls.predictions.decoder"
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)

    def set_output_embeddings(self, module: nn.Module) -> None:
        """Replace the projection; its bias becomes the head's own."""
        assert isinstance(module.bias, nn.Parameter)
        self.cls.predictions.bias = module.bias
        super().set_output_embeddings(module)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput | tuple[object, ...]:
        """Logits (B, T, V), with `labels` (B, T) the loss at those that are not -100.

        In training with `loss_implementation` set, the loss never forms the logits: they are None.
        `num_items_in_batch` replaces the number of labels that the loss is divided by.

        Other arguments as BertModel.forward.
        """
        body = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        hidden, loss, logits = body.last_hidden_state, None, None
        fused = self.config.loss_implementation if labels is not None and self.training else None
        if fused is not None:
            predictions = self.cls.predictions
            loss = linear_causal_lm_loss(
                predictions.decoder,
                predictions.transform(hidden),
                None,
                shift_labels=labels,
                num_items_in_batch=num_items_in_batch,
                implementation=fused,
            )
        else:
            logits = self.cls(hidden)
            if labels is not None:
                loss = token_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        output = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class BertForSequenceClassification(BertPreTrainedModel):
    """The body and a classifier of sequences on the pooled vector."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[object, ...]:
        """Logits (B, num_labels).

        With `labels` the loss of losses.sequence_classification_loss, by `config.problem_type`.

        Other arguments as BertModel.forward.
        """
        body = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits, loss = self.classifier(self.dropout(body.pooler_output)), None
        if labels is not None:
            loss = sequence_classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class BertForTokenClassification(BertPreTrainedModel):
    """The body and a classifier of tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[object, ...]:
        """Logits (B, T, num_labels), with `labels` (B, T) the loss at those that are not -100.

        Other arguments as BertModel.forward.
        """
        body = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits = self.classifier(self.dropout(body.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class BertForQuestionAnswering(BertPreTrainedModel):
    """The body and two logits a token, for the start and the end of an answer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ConfigError(
                f"BertForQuestionAnswering needs num_labels=2 (start, end); the configuration has "
                f"num_labels={config.num_labels}"
            )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[object, ...]:
        """Logits (B, T) of start and end, with both positions (B,) the loss of both.

        Other arguments as BertModel.forward.
        """
        body = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            True,
        )
        output = answers(self.qa_outputs(body.last_hidden_state), start_positions, end_positions)
        output.hidden_states, output.attentions = body.hidden_states, body.attentions
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


def _head_dropout(config: BertConfig) -> float:
    given = config.classifier_dropout
    return config.hidden_dropout_prob if given is None else given
