"""linear: several projections of one input, their backends, and the validation of their arguments.

For inference at few rows, where reading the weights is all that counts. It is torch's F.linear in
everything else: gradients, many rows, autocast, graphs. Weights in int8 are read at any number of
rows, and take half the time of 16-bit ones at few.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.registry import AUTO, Choice, Prefer, register_backend, set_preference

OP = "linear"

INT8 = "int8"

_chooser = Chooser(OP, "weights")


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: Sequence[Tensor | None] | None = None,
    implementation: str | Choice = AUTO,
) -> tuple[Tensor, ...]:
    """x @ weight.T + bias for each weight and bias.

    Shapes: x (..., K), weights (N_i, K), biases (N_i,) or None, results (..., N_i).
    `scales`, fp32 (N_i,), belong to weights in int8, which stand for weight * scale[:, None], as
    `eager.quantised` makes them; None to other weights.
    Rounding: fp32 sums, rounded once to x's dtype. Differentiable as F.linear is.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_linear`.

    Raises ValueError or TypeError for shapes, dtypes and devices that do not fit, before anything
    is computed; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    """
    if biases is None:
        biases = (None,) * len(weights)
    _validate(x, weights, biases)
    if scales is None:
        call = _chooser.call_for(x, implementation, x.shape[-1], False, None)
        return call(x, weights, biases)
    _validate_scales(x, weights, scales)
    call = _chooser.call_for(x, implementation, x.shape[-1], False, INT8)
    return call(x, weights, biases, scales)


def resolve_linear(
    weight: Tensor, implementation: str = AUTO, *, weights: str | None = None
) -> Choice:
    """Choose a backend once, for inputs of the device and dtype of `weight` (meta will do).

    `weights` "int8" is for calls with scales. Raises as `linear` does for a backend that is
    unknown, unavailable or cannot serve.
    """
    return _chooser.choose(weight, implementation, weight.shape[-1], False, weights)


def _validate(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            f"linear: {len(weights)} weights and {len(biases)} biases were given; give one or more "
            "weights, and a bias or None for each"
        )
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"linear: x is {tuple(x.shape)} and a weight {tuple(weight.shape)}; a weight must "
                "be (outputs, features), with as many features as x has in its last dimension"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear: a bias is {tuple(bias.shape)}; the weight {tuple(weight.shape)} needs "
                f"({weight.shape[0]},) or None"
            )
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.device != x.device:
                raise ValueError(
                    f"linear: x is on {x.device} and a {name} on {t.device}; move them together"
                )


def _validate_scales(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None]) -> None:
    if len(scales) != len(weights):
        raise ValueError(
            f"linear: {len(weights)} weights and {len(scales)} scales were given; give scales or "
            "None for each weight"
        )
    for weight, scale in zip(weights, scales, strict=True):
        if (scale is None) != (weight.dtype != torch.int8):
            raise TypeError(
                f"linear: scales are {'None' if scale is None else 'given'} for a weight in "
                f"{weight.dtype}; weights in torch.int8 need scales, others have None"
            )
        if scale is None:
            continue
        if scale.shape != weight.shape[:1] or scale.device != x.device:
            raise ValueError(
                f"linear: scales are {tuple(scale.shape)} on {scale.device}; the weight "
                f"{tuple(weight.shape)} needs ({weight.shape[0]},) on {x.device}"
            )
        if scale.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"linear: scales are {scale.dtype}; give them in torch.float32")


_FEATURES = {"weights": frozenset({INT8})}
register_backend(eager_backend(OP, "swathe.kernels.linear.eager.linear", _FEATURES))
register_backend(
    cpp_backend(OP, lambda: import_module("swathe.kernels.linear._cpp").linear, _FEATURES)
)
set_preference(OP, [Prefer(("cpp", "eager"), device="cpu"), Prefer(("eager",))])
