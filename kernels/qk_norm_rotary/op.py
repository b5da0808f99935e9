"""qk_norm_rotary as torch sees it: schemas, fakes, and the autograd node around the launchers.

A backend file offers `forward` and `backward`; `fused(name, module)` turns the two into one
differentiable function. Nothing here imports a backend before its first call.

Saved     q, k, the weights and the tables; rstd is summed again from q and k, read anyway.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          The tables carry no gradient. torch.func.grad works; torch.func.vmap over q and k works,
          over weights, tables and positions it raises.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.op import Op, any_batched, apply, differentiating, gradient, operator
from swathe.kernels.core.rows import empty_as, unit_rows

_ROTATION = (
    "Tensor cos, Tensor sin, Tensor? positions, int[]? mrope_section, int rotary_dim,"
    " bool interleaved"
)
_defined: set[str] = set()


def empty_forward(q: Tensor, k: Tensor | None, *_: Any) -> list[Tensor]:
    """Uninitialised outputs for q and, where there is one, k: what a launcher fills."""
    return [empty_as(q)] if k is None else [empty_as(q), empty_as(k)]


def empty_backward(
    dq: Tensor, dk: Tensor | None, q: Tensor, k: Tensor | None, q_weight: Tensor, *_: Any
) -> list[Tensor]:
    """Uninitialised gradients of q, of k where there is one, and of the weights, end to end."""
    dw = torch.empty((1 if k is None else 2) * q.shape[-1], dtype=q_weight.dtype, device=q.device)
    return [*empty_forward(q, k), dw]


def fused(backend: str, module: str) -> Callable[..., Any]:
    """A differentiable qk_norm_rotary over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"qk_norm_rotary_fwd.{backend}")

    def qk_norm_rotary(
        q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None, *options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if differentiating(q, k, q_weight, k_weight):
            found = apply(_QKNormRotary, q, k, q_weight, k_weight, *options, backend)
        else:
            found = forward(q, k, q_weight, k_weight, *options)
        return found[0] if k is None else (found[0], found[1])

    return qk_norm_rotary


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    operands = "Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, float eps, float offset"
    Op(
        f"qk_norm_rotary_fwd({operands}, str norm_casting, str casting, {_ROTATION}) -> Tensor[]",
        backend,
        module,
        "forward",
        empty_forward,
    )
    Op(
        f"qk_norm_rotary_bwd(Tensor dq, Tensor? dk, {operands}, {_ROTATION}) -> Tensor[]",
        backend,
        module,
        "backward",
        empty_backward,
    )


class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *options, backend = rest
        launch = operator(f"qk_norm_rotary_fwd.{backend}")
        return tuple(launch(q, k, q_weight, k_weight, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, q_weight, k_weight, ctx.eps, ctx.offset, _, _, cos, sin, positions, *layout = inputs
        *ctx.layout, ctx.backend = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, positions)

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, *tables = ctx.saved_tensors
        numbers = (ctx.eps, ctx.offset, *tables, *ctx.layout)
        name, rest = f"qk_norm_rotary_bwd.{ctx.backend}", (None,) * 11
        dq, dk = (None if t is None else unit_rows(t) for t in (dq, dk))
        # an output that took no part in the loss costs nothing and leaves no gradient
        if dq is None and dk is None:
            return None, None, None, None, *rest
        if dq is None:
            dk, dw = gradient(name, dk, None, k, None, k_weight, None, *numbers)
            return None, dk, None, dw, *rest
        if dk is None:
            dq, dw = gradient(name, dq, None, q, None, q_weight, None, *numbers)
            return dq, None, dw, None, *rest
        dq, dk, dw = gradient(name, dq, dk, q, k, q_weight, k_weight, *numbers)
        D = q.shape[-1]
        return dq, dk, dw[:D], dw[D:], *rest

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        q: Tensor,
        k: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor | None,
        *rest: Any,
    ) -> Any:
        if any_batched(in_dims[2:]):
            raise NotImplementedError(
                "qk_norm_rotary: vmap over weights, tables or positions is not provided by fused "
                "backends; allowed: vmap over q and k. Use implementation='eager' for the others."
            )
        # every head of a token is rotated alike, so the batch can stand among the heads
        both = (_among_heads(t, dim) for t, dim in zip((q, k), in_dims[:2], strict=True))
        found = _QKNormRotary.apply(*both, q_weight, k_weight, *rest)
        dims = [None if dim is None else 1 for dim in in_dims[: len(found)]]
        outputs = (
            y if dim is None else y.unflatten(1, (info.batch_size, -1))
            for y, dim in zip(found, dims, strict=True)
        )
        return tuple(outputs), tuple(dims)


def _among_heads(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 1).flatten(1, 2)
