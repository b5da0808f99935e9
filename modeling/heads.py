"""Heads that any decoder family can put on its body; a family only names them.

    class LlamaForSequenceClassification(ForSequenceClassification, LlamaPreTrainedModel):
        body_class = LlamaModel

The body is stored under the family's `base_model_prefix`. Parameter names are HF's: `score`,
`qa_outputs`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.docstrings import auto_docstring
from swathe.modeling.forward import States, wants
from swathe.modeling.losses import (
    question_answering_loss,
    sequence_classification_loss,
    token_loss,
)
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

Cache = DynamicCache | StaticCache
Pooling = Literal["last", "hf"]


class BodyWithHead(PreTrainedModel):
    """A model whose body is a `body_class` under the name `base_model_prefix`."""

    body_class: ClassVar[type[PreTrainedModel] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.body_class is not None:
            cls.embed_path = f"{cls.base_model_prefix}.{cls.body_class.embed_path}"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.body_class is None:
            raise TypeError(
                f"{type(self).__name__} has no body; subclass it together with a family's "
                "PreTrainedModel and set body_class to the family's body"
            )
        self.add_module(self.base_model_prefix, self.body_class(config))


class ForSequenceClassification(BodyWithHead):
    """`score`, without a bias, on the last real token of each sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
        *,
        pooling: Pooling = "last",
    ) -> SequenceClassifierOutputWithPast | tuple[object, ...]:
        """Logits (B, num_labels); which token they are taken from, `last_tokens` says.

        With `labels` the loss of losses.sequence_classification_loss, by `config.problem_type`.
        Other arguments as the body's forward.
        """
        body = self.base_model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
        )
        hidden = body.last_hidden_state
        chosen = last_tokens(
            hidden, input_ids, attention_mask, self.config.pad_token_id, pooling=pooling
        )
        rows = torch.arange(len(hidden), device=hidden.device)
        logits = self.score(hidden[rows, chosen])
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class ForTokenClassification(BodyWithHead):
    """Dropout and `score`, with a bias, on every token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[object, ...]:
        """Logits (B, T, num_labels), with `labels` (B, T) the loss of losses.token_loss.

        The result has no cache, so that none is made unless it is asked for. Other arguments as the
        body's forward.
        """
        body = self.base_model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            bool(use_cache),
            output_attentions,
            output_hidden_states,
            True,
        )
        logits = self.score(self.dropout(body.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


class ForQuestionAnswering(BodyWithHead):
    """`qa_outputs`: two logits a token, for the start and the end of an answer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @auto_docstring
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: States = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[object, ...]:
        """Logits (B, T) of start and end, with both positions (B,) question_answering_loss.

        Other arguments as the body's forward; a cache is not made.
        """
        body = self.base_model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            False,
            output_attentions,
            output_hidden_states,
            True,
        )
        output = answers(self.qa_outputs(body.last_hidden_state), start_positions, end_positions)
        output.hidden_states, output.attentions = body.hidden_states, body.attentions
        return output if wants(self, "return_dict", return_dict) else output.to_tuple()


def answers(
    logits: Tensor, start_positions: Tensor | None, end_positions: Tensor | None
) -> QuestionAnsweringModelOutput:
    """Start and end logits from both in one (B, T, 2), and the loss where positions are given.

    Raises ValueError where only one of the positions is given.
    """
    start, end = (part.contiguous() for part in logits.unbind(-1))
    if (start_positions is None) != (end_positions is None):
        missing = "start_positions" if start_positions is None else "end_positions"
        raise ValueError(f"{missing} is missing; the loss needs both positions, or leave both out")
    loss = None
    if start_positions is not None and end_positions is not None:
        loss = question_answering_loss(start, end, start_positions, end_positions)
    return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)


def last_tokens(
    hidden: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | Mask | None,
    pad_token_id: int | None,
    *,
    pooling: Pooling = "last",
) -> Tensor:
    """Indices (B,) of the token that stands for each sequence of `hidden` (B, T, hidden).

    "last": the last one that a padding mask marks as real; without such a mask the last one that is
    not `pad_token_id`; for a single sequence without either its last. "hf" never looks at the mask,
    which takes an earlier token where padding is also a token of the text (pad == eos), and takes
    the last one, real or not, of `inputs_embeds`. A sequence of padding alone gives 0.
    Raises ValueError where several sequences leave it open.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling={pooling!r}; allowed: {get_args(Pooling)}")
    B, T = hidden.shape[:2]
    real = _real_tokens(attention_mask, T) if pooling == "last" else None
    if real is None and pad_token_id is not None and input_ids is not None:
        real = input_ids != pad_token_id
    if real is not None:
        return (real.to(hidden.device) * torch.arange(T, device=hidden.device)).argmax(1).expand(B)
    if B > 1 and (pooling == "last" or pad_token_id is None):
        raise ValueError(
            f"cannot tell the last token of {B} sequences: there is no padding mask, and "
            f"pad_token_id={pad_token_id} does not help with "
            f"{'inputs_embeds' if input_ids is None else 'input_ids'}. Pass attention_mask (B, T), "
            "set config.pad_token_id together with input_ids, or use one sequence at a time"
        )
    return torch.full((B,), T - 1, device=hidden.device)


def _real_tokens(mask: Tensor | Mask | None, T: int) -> Tensor | None:
    """(B, T), True at real tokens, of a mask in one of the padding forms; None for others."""
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
        return None
    if mask.dim() > 2:
        if mask.is_floating_point() or any(size != 1 for size in mask.shape[1:-1]):
            return None
        mask = mask.flatten(0, -2)
    return mask[:, -T:] != 0
