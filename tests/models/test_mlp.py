"""The gated MLP as a module beside transformers' own: values and gradients, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from swathe.modeling.layers.mlp import GatedMLP, PackedMLP

HIDDEN, WIDTH = 48, 37
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2")


def pair(kind: str, act: str, bias: bool) -> tuple[Any, Any]:
    """(transformers' module, ours) with the same weights."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "hidden_act": act,
        "num_attention_heads": 4,
    }
    if kind == "packed":
        theirs: Any = Phi3MLP(transformers.Phi3Config(**given, pad_token_id=0))
        ours: Any = PackedMLP(HIDDEN, WIDTH, act)
    else:
        theirs = LlamaMLP(transformers.LlamaConfig(**given, mlp_bias=bias))
        ours = GatedMLP(HIDDEN, WIDTH, act, bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(module: Any) -> list[Tensor]:
    """y, and the gradients of x and of every parameter."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 2, 5, HIDDEN, generator=generator).unbind()
    x = x.to(module.down_proj.weight.dtype).requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "bias"), [("apart", False), ("apart", True), ("packed", False)])
def test_values_and_every_gradient(kind: str, bias: bool, act: str, backend: str) -> None:
    theirs, ours = pair(kind, act, bias)
    ours.choice = ours.pick(backend)
    assert f"act={act}, backend={backend}" in repr(ours)
    for mine, other in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["apart", "packed"])
def test_bf16_rounds_as_theirs(kind: str, act: str) -> None:
    theirs, ours = pair(kind, act, bias=False)
    ours.choice = ours.pick("eager")
    for mine, other in zip(run(ours.bfloat16()), run(theirs.bfloat16()), strict=True):
        assert torch.equal(mine, other)
