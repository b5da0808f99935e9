"""rms_norm: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from typing import Literal, overload

from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.errors import did_you_mean
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
from swathe.kernels.norm.op import fused

OP = "rms_norm"
Casting = Literal["llama", "gemma", "fp32"]
CASTINGS: tuple[Casting, ...] = ("llama", "gemma", "fp32")

_chooser = Chooser(OP, "weight_dtype", "offset", "casting", "residual")


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    offset: float = ...,
    casting: Casting = ...,
    residual: None = ...,
    implementation: str | Choice = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    offset: float = ...,
    casting: Casting = ...,
    residual: Tensor,
    implementation: str | Choice = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    residual: Tensor | None = None,
    implementation: str | Choice = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of `x` to unit root mean square, then by `offset + weight`.

    With a `residual`, x + residual is formed first, in the same pass, and returned as well:
    `y, h = rms_norm(x, w, residual=r)` is `h = x + r; y = rms_norm(h, w)`.

    Shapes: x, residual, y, h (..., N); weight (N,). eps is in units of x squared.
    Rounding: statistics and products in fp32 (fp64 for fp64 input on "eager"). casting "llama"
    rounds the normalised row to the dtype of h before the weight, as HF's LlamaRMSNorm does, and y
    has the promoted dtype of h and weight; "gemma" (use offset=1) and "fp32" round once, to h's.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_rms_norm`.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    Second derivatives and forward-mode AD of fused backends raise.
    """
    _validate(x, weight, eps, casting, residual)
    grad = wants_gradient(x, weight, residual)
    added = residual is not None
    facts = (x.shape[-1], grad, weight.dtype, offset != 0, casting, added)
    call = _chooser.call_for(x, implementation, *facts)
    return call(x, weight, eps, offset, casting, residual)


def resolve_rms_norm(
    x: Tensor,
    weight: Tensor,
    implementation: str = AUTO,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    residual: bool = False,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like `x` and `weight` (meta tensors will do).

    Raises as `rms_norm` does for a backend that is unknown, unavailable or cannot serve.
    """
    facts = (x.shape[-1], grad, weight.dtype, offset != 0, casting, residual)
    return _chooser.choose(x, implementation, *facts)


def _validate(x: Tensor, weight: Tensor, eps: float, casting: str, residual: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"rms_norm: x has shape {tuple(x.shape)}; it needs at least one dimension, and a last "
            "dimension of one or more features"
        )
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"rms_norm: weight is {tuple(weight.shape)} on {weight.device}; x of shape "
            f"{tuple(x.shape)} needs a weight of ({x.shape[-1]},) on {x.device}"
        )
    if not (x.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise TypeError(
            f"rms_norm: x is {x.dtype} and weight is {weight.dtype}; both must be floating point: "
            "float16, bfloat16, float32, or float64 with implementation='eager'"
        )
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"rms_norm: residual is {tuple(residual.shape)} on {residual.device}; it must be "
            f"{tuple(x.shape)} on {x.device} like x (expand it yourself if it is to be broadcast)"
        )
    if residual is not None and not residual.dtype.is_floating_point:
        raise TypeError(f"rms_norm: residual is {residual.dtype}; it must be floating point")
    if casting not in CASTINGS:
        raise ValueError(
            f"rms_norm: casting={casting!r}{did_you_mean(casting, CASTINGS)}; allowed: {CASTINGS}"
        )
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps={eps}; it must be a number of zero or more")


def _mixed_with_double(spec: Spec) -> list[str]:
    weight_dtype = dict(spec.features).get("weight_dtype", spec.dtype)
    return [] if weight_dtype == spec.dtype else [f"needs a weight of {spec.dtype}, like x"]


_FUSED: dict[str, frozenset[Hashable] | str] = {
    "casting": frozenset(CASTINGS),
    "offset": ANY,
    "residual": ANY,
    "weight_dtype": frozenset[Hashable](FLOATS),
}

register_backend(
    eager_backend(OP, "swathe.kernels.norm.eager.rms_norm", {**_FUSED, "weight_dtype": ANY})
)
register_backend(
    Backend(
        OP,
        "torch",
        load=lambda: import_module("swathe.kernels.norm._torch").rms_norm,
        capabilities=Capabilities(
            devices=frozenset({"cpu", "cuda", "meta"}),
            dtypes=FLOATS_AND_DOUBLE,
            # with a residual, autograd would round dx once more than the contract allows
            features={"casting": frozenset({"fp32"}), "weight_dtype": ANY},
        ),
        limits=_mixed_with_double,
    )
)
register_backend(cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.norm._cpp"), _FUSED))
register_backend(triton_backend(OP, lambda: fused("triton", "swathe.kernels.norm._triton"), _FUSED))
set_preference(
    OP,
    [
        Prefer(("triton", "torch", "eager"), device="cuda"),
        Prefer(("cpp", "torch", "eager"), device="cpu"),
        Prefer(("eager",)),
    ],
)
