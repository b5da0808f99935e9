"""The proof: it catches what recognition would miss, and leaves no trace on the module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.hf_patching import BACKEND, tiny
from swathe.modeling.hf.patching import norms
from swathe.modeling.hf.patching import patch as engine
from swathe.modeling.hf.patching.norm_forms import RMSForm
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.patch import patch
from swathe.modeling.hf.patching.prove import Call, prove
from swathe.modeling.hf.patching.report import Candidate

N = 32


class Norm(nn.Module):
    """Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def calls(dtype: torch.dtype, scale: float = 1.0) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(5, N, generator=generator) * scale
        yield Call((x.to(dtype).requires_grad_(),))


def fused(form: RMSForm) -> Any:
    return norms.fused_forward(Norm, form, None, BACKEND)


RIGHT = RMSForm("weight", 1e-6, 0.0, "llama")
LIES = {
    "eps": replace(RIGHT, eps=1e-2),
    "offset": replace(RIGHT, offset=1.0),
    "weight": replace(RIGHT, weight=None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    found = prove(Norm().to(dtype), fused(RIGHT), calls(dtype))
    assert found.failure is None and 0.5 < found.error <= 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lie", LIES)
def test_what_is_wrong_is_a_reason(lie: str, dtype: torch.dtype) -> None:
    found = prove(Norm().to(dtype), fused(LIES[lie]), calls(dtype))
    assert found.failure is not None and (found.error > 2 or "gives none" in found.failure)


def _rounded(self: Any, x: Tensor) -> Tensor:
    # as exact as bf16 allows in the middle, so wrong only in the last bits
    return Norm.forward(self, x.bfloat16().to(x.dtype))


def _without_gradient(self: Any, x: Tensor) -> Tensor:
    return Norm.forward(self, x.detach())


def _half_gradient(self: Any, x: Tensor) -> Tensor:
    y = Norm.forward(self, x)
    return y / 2 + (y / 2).detach()


def _one_wrong(self: Any, x: Tensor) -> Tensor:
    y = Norm.forward(self, x)
    return torch.cat([y[..., :-1], 1.1 * y[..., -1:]], -1)


def _raises(self: Any, x: Tensor) -> Tensor:
    raise ZeroDivisionError("on purpose")


def _infinite(self: Any, x: Tensor) -> Tensor:
    return Norm.forward(self, x) / 0


FORWARDS = {
    _rounded: "times the error",
    _without_gradient: "gradient of input 0: ours gives none",
    _half_gradient: "gradient",
    _one_wrong: "output",
    _raises: "raised ZeroDivisionError: on purpose",
    _infinite: "not finite",
    lambda self, x: Norm.forward(self, x).double(): "ours is torch.float64",
    lambda self, x: Norm.forward(self, x)[..., None]: "ours is torch.float32 (5, 32, 1)",
    lambda self, x: (Norm.forward(self, x), x): "another structure",
    lambda self, x: Norm.forward(self, x) if self.training else x: "gives none",
}


@pytest.mark.parametrize("forward", FORWARDS, ids=FORWARDS.values())
def test_every_kind_of_wrong(forward: Any) -> None:
    found = prove(Norm(), forward, calls(torch.float32))
    assert found.failure is not None and FORWARDS[forward] in found.failure


class Counting(Norm):
    """A norm with state that a careless proof would change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.drop(x)
        return super().forward(x)


def test_nothing_of_the_module_changes() -> None:
    module = Counting().eval()
    weight, seen = module.weight.detach().clone(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    before, state = dict(vars(module)), torch.get_rng_state()
    assert prove(module, Counting.forward, calls(torch.float32)).failure is None
    assert vars(module) == before and not module.training and not module.drop.training
    assert torch.equal(module.weight, weight) and module.weight.grad is None
    assert module.seen == 0 and seen == [] and torch.equal(torch.get_rng_state(), state)


def test_grad_mode_of_the_caller_does_not_matter() -> None:
    with torch.no_grad():
        assert prove(Norm(), _without_gradient, calls(torch.float32)).failure is not None
        assert not torch.is_grad_enabled()


def test_a_liar_that_is_recognised_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_proofs", {})
    monkeypatch.setattr(norms, "rms_form", lambda e: LIES["eps"])
    model = nn.Sequential(Norm())
    (row,) = patch(model, backend=BACKEND).rows
    assert row.action == "left" and row.reason.startswith("failed its proof: ")
    assert row.error is not None and row.error > 2
    assert type(model[0]) is Norm and "_swathe_patch" not in vars(model)


def test_one_proof_serves_equal_modules_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[int] = []
    real = norms.prove
    monkeypatch.setattr(engine, "_proofs", {})
    monkeypatch.setattr(norms, "prove", lambda *a, **k: proven.append(1) or real(*a, **k))
    other, wide = Norm(), nn.RMSNorm(N, eps=1e-6)
    changed = type("Changed", (Norm,), {})()
    model = nn.Sequential(Norm(), Norm(), other, wide, changed, Norm().bfloat16(), Norm())
    report = patch(model, backend=BACKEND, layer_norm=False)
    assert len(report.patched) == 7
    assert len(proven) == 4  # Norm in fp32 and bf16, torch's, and the other class


def test_a_candidate_that_cannot_be_applied_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: nn.Module, options: Options) -> list[Candidate]:
        (last,) = norms.find(nn.Sequential(Norm()), options)

        def apply(undo: Any) -> None:
            raise OSError("no")

        return [replace(last, apply=apply)]

    monkeypatch.setattr(engine, "FINDERS", (norms.find, failing))
    model = nn.Sequential(Norm(), nn.RMSNorm(N, eps=1e-6))
    with pytest.raises(OSError, match="no"):
        patch(model, backend=BACKEND)
    assert [type(m) for m in model] == [Norm, nn.RMSNorm]


def test_the_report_prints_and_serialises() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = nn.Mish()
    report = patch(model, backend=BACKEND, rope=False, residual=False, layer_norm=True)
    made = json.loads(report.to_json())
    assert made["schema"] == 1 and len(made["rows"]) == len(report.rows)
    assert made["counts"]["gated_mlp_act"] == {"patched": 1, "left": 1}
    assert made["counts"]["rms_norm"] == {"patched": 5, "left": 0}
    assert all(row["reason"] for row in made["rows"] if row["action"] == "left")
    assert all(row["error"] for row in made["rows"] if row["action"] == "patched")
    lines = str(report).splitlines()
    column = lines[0].index("backend")
    assert {line[column - 1] for line in lines[1:-1]} == {" "}
    grouped = next(line for line in lines if "model.layers.*.input_layernorm" in line)
    assert grouped.split()[1:4] == ["2", "LlamaRMSNorm", "rms_norm"]
    assert "computes no gated MLP that we have" in str(report)
