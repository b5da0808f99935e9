"""BERT and its heads: masked language model, sequence and token classes, answers in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.bert.body_bert import BertModel, BertPreTrainedModel
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.bert.prediction_bert import BertOnlyMLMHead
from swathe.modeling.forward import States, wants
from swathe.modeling.heads import answers
from swathe.modeling.losses import (
    linear_causal_lm_loss,
    sequence_classification_loss,
    token_loss,
)
from swathe.modeling.outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class BertWithHead(BertPreTrainedModel):
    """A body under the name `base_model_prefix`, with a pooler where the head reads it."""

    body_class: ClassVar[type[BertModel]] = BertModel
    add_pooling_layer: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.embed_path = f"{cls.base_model_prefix}.{cls.body_class.embed_path}"
        cls.position_embed_path = f"{cls.base_model_prefix}.{cls.body_class.position_embed_path}"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.body_class(config, self.add_pooling_layer))


class BertForMaskedLM(BertWithHead):
    """The body and logits over the vocabulary, tied to the embeddings where configured."""

    head_path: ClassVar[str] = "cls.predictions.decoder"
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
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
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | Mask | None = None,
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
        body = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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


class BertForSequenceClassification(BertWithHead):
    """The body and a classifier of sequences on the pooled vector."""

    add_pooling_layer: ClassVar[bool] = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
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
        body = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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


class BertForTokenClassification(BertWithHead):
    """The body and a classifier of tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
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
        body = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(body.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class BertForQuestionAnswering(BertWithHead):
    """The body and two logits a token, for the start and the end of an answer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ConfigError(
                f"{type(self).__name__} needs num_labels=2 (start, end); the configuration has "
                f"num_labels={config.num_labels}"
            )
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
        body = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        output = answers(self.qa_outputs(body.last_hidden_state), start_positions, end_positions)
        output.hidden_states, output.attentions = body.hidden_states, body.attentions
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


def _head_dropout(config: BertConfig) -> float:
    given = config.classifier_dropout
    return config.hidden_dropout_prob if given is None else given
