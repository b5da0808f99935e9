"""The source of a forward with sums and norms joined: what is found, and what it computes."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.hf_patching import (
    BACKEND,
    apply,
    counted,
    leftovers,
)

pytest.importorskip("transformers")

from swathe.modeling.hf.patching import layers
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.rewriting import in_place, rewritten, sites
from swathe.modeling.hf.patching.sources import Unreadable
from swathe.modeling.hf.patching.swaps import is_fused

TANH = "torch.tanh(self.norm(h))"
CALLS = ((layers, "rms_norm"), (layers, "layer_norm"))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


class Layer(nn.Module):
    flag = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.norm3 = Norm(), Norm(), Norm()
        self.dropout, self.factor = nn.Dropout(0.5), 0.25

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Stock(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        residual = h
        h = self.norm(h)
        h = h * 2
        h = residual + h
        return h


class Scaled(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + self.dropout(y) * self.factor
        residual = h
        h = h + torch.tanh(self.norm(h))
        return residual + self.norm2(h)


class Inline(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.norm2(x + y) + y)


class Branches(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.flag:
            h = x + y
            h = self.norm(h)
        else:
            h = x + y
            h = self.norm2(h)
        h = h + y
        if y is not None:
            h = self.norm3(h)
        return h


class Sometimes(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        z = self.norm(h) if self.training else h
        h = z + y
        h = h * 2
        h = self.norm2(h)
        return h


class InPlace(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x * 1
        h += y
        h = self.norm(h)
        return h


class Inherits(Stock):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = super().forward(x, y) + y
        h = self.norm2(h)
        return h


class Keywords(Layer):
    def forward(self, x: Tensor, y: Tensor | None = None, *, z: float = 2.0, **more: Any) -> Tensor:
        h = x + (y if y is not None else x) * z
        h = self.norm(h)
        return h + more.get("w", 0)


class Fails(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        h = self.norm(h)
        raise LookupError("what the layer says")


def found_sites(cls: type[nn.Module]) -> list[str]:
    return [site.text for site in sites(cls.forward)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "texts"),
    [
        (Stock, ["self.norm(x + y)"]),
        (Scaled, ["self.norm(x + self.dropout(y) * self.factor)", f"self.norm2(h + {TANH})"]),
        (Inline, ["self.norm(self.norm2(x + y) + y)", "self.norm2(x + y)"]),
        (Branches, ["self.norm(x + y)", "self.norm2(x + y)"]),
        (Sometimes, []),
        (InPlace, []),
        (Inherits, ["self.norm2(super().forward(x, y) + y)"]),
    ],
)
def test_sums_and_norms_are_found(cls: type[nn.Module], texts: list[str]) -> None:
    assert found_sites(cls) == texts


def test_a_sum_in_place_is_named() -> None:
    assert in_place(InPlace.forward) == ("norm",)  # type: ignore[arg-type]
    (left,) = layers.find(nn.Sequential(InPlace()), Options(backend=BACKEND))
    assert left.reason == "the sum that norm takes is made in place"


@pytest.mark.parametrize("cls", [Stock, Scaled, Inline, Branches, Inherits, Keywords])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rewritten_layer_computes_what_it_did(
    cls: type[Layer], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(cls()).to(dtype)
    inputs = [torch.randn(2, 3, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    wanted = run(model[0], inputs)
    undo, found, _ = apply(model, layers)
    assert not leftovers(found)
    calls = counted(monkeypatch, *CALLS)
    ours = run(model[0], inputs)
    assert len(calls) == (2 if cls in (Inline, Scaled) else 1)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    undo.restore()
    assert type(model[0]) is cls


def run(layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    y = layer(*inputs)
    return [y, *torch.autograd.grad(y.sum(), [*inputs, *used(layer)], allow_unused=False)]


def used(layer: nn.Module) -> list[Tensor]:
    return [layer.norm.weight] if type(layer).__name__ != "Inherits" else [layer.norm2.weight]  # type: ignore[union-attr]


def test_flags_choose_the_branch() -> None:
    layer = Branches()
    assert [site.norm for site in sites(Branches.forward) if site.reached(layer)] == ["norm"]  # type: ignore[arg-type]
    layer.flag = False
    assert [site.norm for site in sites(Branches.forward) if site.reached(layer)] == ["norm2"]  # type: ignore[arg-type]


def test_the_signature_and_the_defaults_stay() -> None:
    model = nn.Sequential(Keywords())
    x, w = torch.randn(3, 8), torch.randn(3, 8)
    wanted = [model[0](x), model[0](x, w, z=3.0), model[0](x, y=w, w=w)]
    before = inspect.signature(Keywords.forward)
    apply(model, layers)
    layer = model[0]
    assert is_fused(type(layer)) and inspect.signature(type(layer).forward) == before
    for ours, theirs in zip(
        [layer(x), layer(x, w, z=3.0), layer(x, y=w, w=w)], wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_tracebacks_show_the_new_source() -> None:
    model = nn.Sequential(Fails())
    apply(model, layers)
    with pytest.raises(LookupError) as caught:
        model[0](torch.randn(1, 8), torch.randn(1, 8))
    shown = "".join(traceback.format_exception(caught.value))
    assert "raise LookupError('what the layer says')" in shown and "sums joined with norm" in shown
    assert "add_norm" in inspect.getsource(type(model[0]).forward)


def test_what_was_normed_does_not_live_on() -> None:
    new = rewritten(Stock.forward, {"norm": lambda norm, a, b: (a + b, norm(a + b))}, "<new>")  # type: ignore[arg-type]
    assert "del _swathe_normed_0" in inspect.getsource(new)


def test_without_a_source_it_is_left_alone() -> None:
    names: dict[str, Any] = {"Layer": Layer}
    body = "  def forward(self, x, y):\n    h = x + y\n    h = self.norm(h)\n    return h\n"
    exec("class Hidden(Layer):\n" + body, names)
    (left,) = layers.find(nn.Sequential(names["Hidden"]()), Options(backend=BACKEND))
    assert left.reason == "its source is not to be had"


def test_another_source_than_what_runs_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    sites.cache_clear()
    monkeypatch.setattr(inspect, "getsource", lambda _: "def forward(self, x, y):\n    return x\n")
    with pytest.raises(Unreadable, match="not what it was compiled of"):
        sites(Stock.forward)  # type: ignore[arg-type]
    sites.cache_clear()


def test_shapes_that_broadcast_go_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Stock())
    x, y = torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    wanted = model[0](x, y)
    apply(model, layers)
    calls = counted(monkeypatch, *CALLS)
    assert torch.equal(model[0](x, y), wanted)
    assert torch.equal(
        model[0](x.bfloat16(), y.expand(2, 3, 8)), Stock.forward(model[0], x.bfloat16(), y)
    )
    assert not calls
