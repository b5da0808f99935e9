"""What layer_norm refuses, and what each message says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import swathe
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.layer_norm.api import layer_norm, resolve_layer_norm

X, W = torch.ones(2, 8), torch.ones(8)
Call = Callable[[], object]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "a scalar": (lambda: layer_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
    "no features": (lambda: layer_norm(torch.ones(2, 0)), ValueError, "one or more features"),
    "weight size": (
        lambda: layer_norm(X, torch.ones(4)),
        ValueError,
        r"weight is \(4,\) on cpu.*needs a weight of \(8,\)",
    ),
    "bias size": (lambda: layer_norm(X, W, torch.ones(1)), ValueError, r"bias is \(1,\)"),
    "weight device": (
        lambda: layer_norm(X, torch.ones(8, device="meta")),
        ValueError,
        "on meta.*on cpu",
    ),
    "integers": (lambda: layer_norm(X.int()), TypeError, "x is torch.int32"),
    "integer weight": (lambda: layer_norm(X, W.int()), TypeError, "weight is torch.int32"),
    "two dtypes of weights": (
        lambda: layer_norm(X, W, W.half()),
        TypeError,
        "weight is torch.float32 and bias is torch.float16.*convert one",
    ),
    "residual shape": (
        lambda: layer_norm(X, residual=W),
        ValueError,
        r"residual is \(8,\).*must be \(2, 8\).*expand it yourself",
    ),
    "residual dtype": (lambda: layer_norm(X, residual=X.int()), TypeError, "residual is torch.int"),
    "eps": (lambda: layer_norm(X, eps=-1.0), ValueError, "eps=-1.0"),
    "nan eps": (lambda: layer_norm(X, eps=float("nan")), ValueError, "eps=nan"),
    "backend name": (
        lambda: layer_norm(X, implementation="trion"),
        ValueError,
        "did you mean 'triton'",
    ),
    "torch with a residual": (
        lambda: layer_norm(X, residual=X, implementation="torch"),
        UnsupportedFeature,
        "does not serve residual=True.*'eager'",
    ),
    "torch with other weights": (
        lambda: layer_norm(X, W.half(), implementation="torch"),
        UnsupportedFeature,
        "needs weights of torch.float32, like x",
    ),
    "torch's 16-bit gradients": (
        lambda: layer_norm(X.half().requires_grad_(), implementation="torch"),
        UnsupportedFeature,
        "sums gradients in torch.float16 on a CPU",
    ),
    "fp64": (
        lambda: layer_norm(X.double(), W.double(), implementation="triton"),
        UnsupportedFeature,
        "not float64.*'eager'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_choice_on_another_device_is_refused() -> None:
    choice = replace(resolve_layer_norm(X, W, "eager"), backend="far", devices=frozenset({"cuda"}))
    with pytest.raises(ValueError, match=r"the input is on cpu.*chosen for \['cuda'\]"):
        layer_norm(X, W, implementation=choice)


def test_auto_explain_and_meta() -> None:
    assert resolve_layer_norm(X, W).backend == "torch"
    assert resolve_layer_norm(X, W, residual=True).backend == "eager"
    assert "-> eager" in swathe.explain("layer_norm", device="meta")
    y, h = swathe.layer_norm(X.to("meta"), residual=X.to("meta"))
    assert y.shape == h.shape == X.shape and y.device.type == "meta"
