"""layer_norm: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from typing import overload

import torch
from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import (
    AUTO,
    Backend,
    Choice,
    Prefer,
    register_backend,
    set_preference,
)
from swathe.kernels.core.spec import ANY, FLOATS, FLOATS_AND_DOUBLE, Capabilities, Spec
from swathe.kernels.layer_norm.op import fused

OP = "layer_norm"

_chooser = Chooser(OP, "weight_dtype", "residual")


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    implementation: str | Choice = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
    implementation: str | Choice = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    implementation: str | Choice = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shift each row of `x` to mean 0 and scale it to variance 1, then times `weight` plus `bias`.

    With a `residual`, x + residual is formed first, in the same pass, and returned as well:
    `y, h = layer_norm(x, w, b, residual=r)` is `h = x + r; y = layer_norm(h, w, b)`.

    Shapes: x, residual, y, h (..., N); weight and bias (N,), of one dtype, each may be left out.
    eps is in units of x squared.
    Rounding: statistics and products in fp32 (fp64 for fp64 input on "eager"); y is rounded once,
    to h's dtype, whatever the weights have.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_layer_norm`.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    Second derivatives and forward-mode AD of fused backends raise.
    """
    _validate(x, weight, bias, eps, residual)
    grad = wants_gradient(x, weight, bias, residual)
    facts = (x.shape[-1], grad, _weight_dtype(x, weight, bias), residual is not None)
    call = _chooser.call_for(x, implementation, *facts)
    return call(x, weight, bias, eps, residual)


def resolve_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    implementation: str = AUTO,
    *,
    residual: bool = False,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like `x` and `weight` (meta tensors will do).

    Raises as `layer_norm` does for a backend that is unknown, unavailable or cannot serve.
    """
    facts = (x.shape[-1], grad, _weight_dtype(x, weight, None), residual)
    return _chooser.choose(x, implementation, *facts)


def _weight_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    present = weight if weight is not None else bias
    return x.dtype if present is None else present.dtype


def _validate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"layer_norm: x has shape {tuple(x.shape)}; it needs at least one dimension, and a "
            "last dimension of one or more features"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"layer_norm: x is {x.dtype}; it must be floating point: float16, bfloat16, float32, "
            "or float64 with implementation='eager'"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.shape != x.shape[-1:] or t.device != x.device):
            raise ValueError(
                f"layer_norm: {name} is {tuple(t.shape)} on {t.device}; x of shape "
                f"{tuple(x.shape)} needs a {name} of ({x.shape[-1]},) on {x.device}"
            )
        if t is not None and not t.is_floating_point():
            raise TypeError(f"layer_norm: {name} is {t.dtype}; it must be floating point")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(
            f"layer_norm: weight is {weight.dtype} and bias is {bias.dtype}; they must have one "
            "dtype: convert one of them"
        )
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"layer_norm: residual is {tuple(residual.shape)} on {residual.device}; it must be "
            f"{tuple(x.shape)} on {x.device} like x (expand it yourself if it is to be broadcast)"
        )
    if residual is not None and not residual.is_floating_point():
        raise TypeError(f"layer_norm: residual is {residual.dtype}; it must be floating point")
    if not eps >= 0:
        raise ValueError(f"layer_norm: eps={eps}; it must be a number of zero or more")


def _torch_limits(spec: Spec) -> list[str]:
    weight_dtype = dict(spec.features).get("weight_dtype", spec.dtype)
    found = [] if weight_dtype == spec.dtype else [f"needs weights of {spec.dtype}, like x"]
    if spec.device == "cpu" and spec.grad and spec.dtype in (torch.bfloat16, torch.float16):
        found.append(f"sums gradients in {spec.dtype} on a CPU")
    return found


_FUSED: dict[str, frozenset[Hashable] | str] = {
    "residual": ANY,
    "weight_dtype": frozenset[Hashable](FLOATS),
}

register_backend(
    eager_backend(OP, "swathe.kernels.layer_norm.eager.layer_norm", {**_FUSED, "weight_dtype": ANY})
)
register_backend(
    Backend(
        OP,
        "torch",
        load=lambda: import_module("swathe.kernels.layer_norm._torch").layer_norm,
        capabilities=Capabilities(
            devices=frozenset({"cpu", "cuda", "meta"}),
            dtypes=FLOATS_AND_DOUBLE,
            # with a residual, autograd would round dx once more than the contract allows
            features={"weight_dtype": ANY},
        ),
        limits=_torch_limits,
    )
)
register_backend(cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.layer_norm._cpp"), _FUSED))
register_backend(
    triton_backend(OP, lambda: fused("triton", "swathe.kernels.layer_norm._triton"), _FUSED)
)
set_preference(
    OP,
    [
        Prefer(("triton", "torch", "eager"), device="cuda"),
        # in fp32 torch's op is as fast for many rows and ahead for few
        Prefer(("torch", "eager"), device="cpu", dtype=torch.float32),
        Prefer(("torch", "cpp", "eager"), device="cpu"),
        Prefer(("eager",)),
    ],
)
