"""The example models beside the transformers models that compute the same."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from swathe.modeling.examples import my_new_model
from swathe.modeling.examples.my_new_model import MyNewModelConfig
from swathe.modeling.examples.my_new_model_2 import (
    MyNewModel2Config,
    MyNewModel2ForSequenceClassification,
)

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.randint(1, 99, (3, 9), generator=torch.Generator().manual_seed(1))
RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
PADDED = IDS * RIGHT


def randomise_vectors(model: nn.Module) -> None:
    """Other values for norms and biases, which both begin with ones that hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def llama_pair(kind: str, attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """(transformers' Llama with MLP biases, MyNewModel) with the same weights in eval mode."""
    torch.manual_seed(0)
    values = {**TINY, "mlp_bias": True, **changes}
    theirs = getattr(transformers, f"Llama{kind}")(
        transformers.LlamaConfig(**values, attn_implementation="eager")
    ).eval()
    randomise_vectors(theirs)
    config = MyNewModelConfig(**{**TINY, **changes}, attn_implementation=attn)
    model = getattr(my_new_model, f"MyNewModel{kind}")(config).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, model


def assert_same_loss_and_gradients(theirs: Any, model: Any, **inputs: Tensor) -> None:
    expected, out = theirs.train()(**inputs), model.train()(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    expected.loss.backward()
    out.loss.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-5)


def gemma_pair(attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """(transformers' Gemma classifier, MyNewModel2's) with the same weights in eval mode."""
    torch.manual_seed(0)
    values = {**TINY, "num_labels": 3, **changes}
    config = MyNewModel2Config(**values, attn_implementation=attn)
    stated = {"head_dim": config.head_dim, "hidden_act": config.hidden_act}
    theirs = transformers.GemmaForSequenceClassification(
        transformers.GemmaConfig(**{**values, **stated}, attn_implementation="eager")
    ).eval()
    randomise_vectors(theirs)
    model = MyNewModel2ForSequenceClassification(config).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, model
