"""A tiny BERT of transformers' and ours, with the same weights and inputs for both."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import swathe.modeling.families.bert.modeling_bert as ours
from swathe.modeling.families.bert.configuration_bert import BertConfig

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
B, T = 3, 11
IDS = torch.randint(1, 99, (B, T), generator=torch.Generator().manual_seed(1))
TYPES = torch.randint(0, 3, (B, T), generator=torch.Generator().manual_seed(2))


def reference(head: str, **changes: Any) -> Any:
    """transformers' model with random weights, biases and norms included, in eval mode."""
    torch.manual_seed(0)
    theirs_config = transformers.BertConfig(**{**TINY, **changes})
    theirs_config._attn_implementation = "eager"
    theirs = getattr(transformers, head)(theirs_config).eval()
    randomise_vectors(theirs)
    return theirs


@torch.no_grad()
def randomise_vectors(model: Any) -> None:
    """Other values for norms and biases, which both begin with ones that hide mistakes."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0, 0.2)


def pair(head: str, attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights."""
    theirs = reference(head, **changes)
    config = BertConfig(**{**TINY, **changes}, attn_implementation=attn)
    model = getattr(ours, head)(config).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, model


def same(mine: Any, other: Any, **close: Any) -> None:
    """Every tensor of both outputs, under the same names."""
    assert list(mine.keys()) == list(other.keys())
    for name, value in mine.items():
        mine_all = value if isinstance(value, tuple) else (value,)
        others = other[name] if isinstance(value, tuple) else (other[name],)
        for one, expected in zip(mine_all, others, strict=True):
            torch.testing.assert_close(one, expected, **(close or CLOSE))
