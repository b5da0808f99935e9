"""A tiny DummyBert beside transformers' BERT, an encoder for it to read, and masks of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from support.tiny_bert import TINY, B, T, randomise_vectors, reference
from swathe.modeling.examples import dummy_bert
from swathe.modeling.examples.dummy_bert import DummyBertConfig

BACKENDS = ("eager", "sdpa", "triton")
RELATIVE = ("relative_key", "relative_key_query")
KINDS = ("absolute", *RELATIVE)
CROSSED = {"is_decoder": True, "add_cross_attention": True}
LOOSE = {"atol": 2e-5, "rtol": 2e-5}
S = 7
STATES = torch.randn(B, S, TINY["hidden_size"], generator=torch.Generator().manual_seed(4))
SEEN = torch.tensor([[1] * S, [1] * 3 + [0] * 4, [0] * 2 + [1] * 5])
RIGHT = torch.tensor([[1] * T, [1] * 4 + [0] * (T - 4), [1] * (T - 1) + [0]])


def dummy(head: str = "Model", attn: str = "eager", **changes: Any) -> Any:
    """A DummyBert with random weights, biases and norms included, in eval mode."""
    torch.manual_seed(0)
    config = DummyBertConfig(**{**TINY, **changes}, attn_implementation=attn)
    model = getattr(dummy_bert, f"DummyBert{head}")(config).eval()
    randomise_vectors(model)
    return model


def pair(head: str, attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """(transformers' BERT, DummyBert) with the same weights in eval mode."""
    theirs = reference(f"Bert{head}", **changes)
    model = dummy(head, attn, **changes)
    model.load_state_dict(renamed(theirs.state_dict(), "bert.", "dummy_bert."), strict=True)
    return theirs, model


def renamed(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The same tensors under another prefix of the body."""
    return {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in state.items()}


def assert_same(found: Any, expected: Any, **close: float) -> None:
    """Every field that is set in `found`, lists of layers included."""
    for name, value in found.items():
        layers = value if isinstance(value, tuple) else (value,)
        others = expected[name] if isinstance(value, tuple) else (expected[name],)
        for one, other in zip(layers, others, strict=True):
            torch.testing.assert_close(one, other, **(close or {"atol": 1e-5, "rtol": 1e-5}))
