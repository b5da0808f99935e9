"""linear: several projections of one input, their backends, and the validation of their arguments.

For inference at few rows, where reading the weights is all that counts. It is torch's F.linear in
everything else: gradients, many rows, autocast, graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.registry import AUTO, Choice, Prefer, register_backend, set_preference

OP = "linear"

_chooser = Chooser(OP)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    implementation: str | Choice = AUTO,
) -> tuple[Tensor, ...]:
    """x @ weight.T + bias for each weight and bias.

    Shapes: x (..., K), weights (N_i, K), biases (N_i,) or None, results (..., N_i).
    Rounding: fp32 sums, rounded once to x's dtype. Differentiable as F.linear is.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_linear`.

    Raises ValueError or TypeError for shapes, dtypes and devices that do not fit, before anything
    is computed; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    """
    if biases is None:
        biases = (None,) * len(weights)
    _validate(x, weights, biases)
    call = _chooser.call_for(x, implementation, x.shape[-1], False)
    return call(x, weights, biases)


def resolve_linear(weight: Tensor, implementation: str = AUTO) -> Choice:
    """Choose a backend once, for inputs of the device and dtype of `weight` (meta will do).

    Raises as `linear` does for a backend that is unknown, unavailable or cannot serve.
    """
    return _chooser.choose(weight, implementation, weight.shape[-1], False)


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


register_backend(eager_backend(OP, "swathe.kernels.linear.eager.linear", {}))
register_backend(cpp_backend(OP, lambda: import_module("swathe.kernels.linear._cpp").linear, {}))
set_preference(OP, [Prefer(("cpp", "eager"), device="cpu"), Prefer(("eager",))])
