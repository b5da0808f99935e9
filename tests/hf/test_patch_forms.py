"""Modules that look like what we have and are not: never patched as what they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.hf_patching import BACKEND
from swathe.modeling.hf.patching.norms import find as find_norms
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.patch import patch
from swathe.modeling.hf.patching.report import Candidate, Report

N = 24


class Norm(nn.Module):
    """What the planted ones share; the name of each class is LlamaRMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(N)), None
        self.variance_epsilon = 1e-5

    def __init_subclass__(cls) -> None:
        cls.__name__ = "LlamaRMSNorm"

    def root(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Right(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * self.root(wide)).to(x.dtype)


class EpsilonOutside(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        size = wide.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (wide / size).to(x.dtype)


class MeanSubtracted(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide - wide.mean(-1, keepdim=True)
        return (self.weight * (wide * self.root(wide))).to(x.dtype)


class MeanSubtractedOnlyAbove(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        centred = wide - wide.mean(-1, keepdim=True)
        return self.weight * (centred * self.root(wide)).to(x.dtype)


class WithBias(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * self.root(wide)).to(x.dtype) + self.bias


class Clamped(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32).clamp(-10, 10)
        return self.weight * (wide * self.root(wide)).to(x.dtype)


class OverTokens(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        root = torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * root).to(x.dtype)


class SumOfSquares(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        root = torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * root).to(x.dtype)


class WeightTwice(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * self.weight * (wide * self.root(wide)).to(x.dtype)


class OnePlusInverse(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return ((1 - self.weight.float()) * (wide * self.root(wide))).to(x.dtype)


class Detached(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * self.root(wide.detach())).to(x.dtype)


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * self.root(wide)).to(x.dtype) * F.silu(gate)


WRONG = [
    EpsilonOutside,
    MeanSubtractedOnlyAbove,
    WithBias,
    Clamped,
    OverTokens,
    SumOfSquares,
    WeightTwice,
    OnePlusInverse,
    Detached,
    Gated,
]


def only(module: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> Report:
    model = nn.Sequential(module.to(dtype))
    return patch(model, backend=BACKEND, **options)


@pytest.mark.parametrize("cls", WRONG)
def test_a_norm_that_differs_is_left_alone(cls: type[Norm]) -> None:
    module = cls()
    (row,) = only(module).rows
    assert not row.patched and row.error is None
    assert row.reason == "computes no form of RMSNorm or LayerNorm"
    assert type(module) is cls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_one_that_does_not_differ_is_patched(dtype: torch.dtype) -> None:
    (row,) = only(Right(), dtype).rows
    assert row.patched and row.op == "rms_norm" and row.backend == BACKEND
    assert row.error is not None and row.error <= 1.25


def test_a_name_does_not_decide() -> None:
    module = MeanSubtracted()
    (row,) = only(module).rows
    assert row.patched and row.op == "layer_norm" and row.module == "LlamaRMSNorm"
    x = torch.randn(3, N)
    assert torch.allclose(module(x), MeanSubtracted()(x), atol=1e-6)


def test_an_infinite_variety_of_epsilons_is_read() -> None:
    for eps in (1e-12, 1e-6, 0.5):
        module = Right()
        module.variance_epsilon = eps
        assert only(module).patched
        x = torch.randn(5, N) * 0.01
        torch.testing.assert_close(module(x), Right.forward(module, x))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(N, 40), nn.Linear(N, 40)
        self.down_proj, self.act_fn = nn.Linear(40, N), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ActOnUp(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Summed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Shifted(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class Limited(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * gate)


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FromAnother(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x))


class Packed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(N, 80)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class PackedSecond(Packed):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate))


class Thirds(Packed):
    def forward(self, x: Tensor) -> Tensor:
        gate, up, _ = self.gate_up_proj(x).chunk(3, dim=-1)
        return self.down_proj(F.pad(self.act_fn(gate) * up, (0, 13)))


@pytest.mark.parametrize("cls", [Summed, Shifted, Limited, Twice, Residual, FromAnother, Thirds])
def test_an_mlp_that_differs_is_left_alone(cls: type[nn.Module]) -> None:
    cls.__name__ = "LlamaMLP"
    module = cls()
    (row,) = only(module).rows
    assert not row.patched and row.reason == "computes no gated MLP that we have"
    assert type(module) is cls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [MLP, ActOnUp, Packed, PackedSecond])
def test_which_half_is_activated_is_read(cls: type[nn.Module], dtype: torch.dtype) -> None:
    module = cls()
    (row,) = only(module, dtype).rows
    assert row.patched and row.op == "gated_mlp_act" and type(module) is not cls
    x = torch.randn(2, 3, N, dtype=dtype)
    torch.testing.assert_close(module(x), cls.forward(module, x))


ACTS = [
    "silu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "relu",
    "relu2",
    "gelu_python",
]


@pytest.mark.parametrize("act", ACTS)
def test_activations_of_transformers_are_read_by_what_they_compute(act: str) -> None:
    from transformers.activations import ACT2FN

    module = MLP()
    module.act_fn = ACT2FN[act]
    (row,) = only(module).rows
    assert row.patched
    x = torch.randn(4, N)
    torch.testing.assert_close(module(x), MLP.forward(module, x))


@pytest.mark.parametrize("act", ["mish", "quick_gelu", "sigmoid", "leaky_relu", "gelu_10"])
def test_other_activations_are_left_alone(act: str) -> None:
    from transformers.activations import ACT2FN

    module = MLP()
    module.act_fn = ACT2FN[act]
    assert not only(module).patched


def test_dropout_between_is_left_alone_unless_it_does_nothing() -> None:
    module = MLP()
    module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))  # type: ignore[assignment]
    assert "differs between training and evaluation" in only(module).rows[0].reason
    module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.0))  # type: ignore[assignment]
    assert only(module).patched


def left(module: nn.Module, **options: Any) -> str:
    (found,) = find_norms(module, Options(**{"backend": BACKEND, **options}))
    assert isinstance(found, Candidate) and found.reason is not None
    return found.reason


def test_what_keeps_a_module_from_being_patched() -> None:
    assert left(Right().to("meta")) == "its weights are on the meta device: load them first"
    assert "takes" in left(Right().double(), backend="cpp" if BACKEND == "cpp" else "triton")
    assert only(nn.RMSNorm(N, eps=None)).rows[0].reason.startswith("computes no form")
    overridden = Right()
    overridden.forward = lambda x: x  # type: ignore[method-assign]
    assert left(overridden) == "its forward was overridden on the instance"
    from torch.nn.utils.parametrize import register_parametrization

    parametrized = Right()
    register_parametrization(parametrized, "weight", nn.Identity())
    assert left(parametrized) == "its weights are parametrized"
    whole = Right()
    whole.weight = nn.Parameter(torch.ones(N, dtype=torch.int8), requires_grad=False)
    assert left(whole) == "its weights are int8"
