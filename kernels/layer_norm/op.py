"""LayerNorm as torch sees it: schemas, fakes, and the autograd node around a backend's launchers.

A backend file offers `forward`, `forward_add` and `backward`; `fused(name, module)` turns the
three into one differentiable function. Nothing here imports a backend before its first call.

Saved     h, the weight, mean and rstd: what torch's own keeps.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          torch.func.grad works; torch.func.vmap over activations works, over weights it raises.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.op import Op, apply, differentiating, gradient, operator
from swathe.kernels.core.rows import unit_rows

_defined: set[str] = set()


def empty_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised y (x's shape and dtype, contiguous), and mean over rstd, (2, M) in fp32."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty(2, prod(x.shape[:-1]), dtype=torch.float32, device=x.device)


def empty_forward_add(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, h, and mean over rstd; h has the dtype of `x + residual`."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    y, statistics = empty_forward(h)
    return y, h, statistics


def empty_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dh: Tensor | None,
    sums: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised dx (h's shape and dtype, contiguous), and dw and db end to end in `sums`."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    size = 0 if sums is None else 2 * h.shape[-1]
    return dx, torch.empty(size, dtype=sums or h.dtype, device=h.device)


def fused(backend: str, module: str) -> Callable[..., Any]:
    """A differentiable layer_norm over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"layer_norm_fwd.{backend}")
    forward_add = operator(f"add_layer_norm_fwd.{backend}")

    def layer_norm(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        differentiate = differentiating(x, weight, bias, residual)
        if residual is None:
            if differentiate:
                return apply(_LayerNorm, x, weight, bias, eps, backend)[0]
            return forward(x, weight, bias, eps)[0]
        if differentiate:
            y, h, _ = apply(_AddLayerNorm, x, residual, weight, bias, eps, backend)
        else:
            y, h, _ = forward_add(x, residual, weight, bias, eps)
        return y, h

    return layer_norm


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    Op(
        "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor statistics)",
        backend,
        module,
        "forward",
        empty_forward,
    )
    Op(
        "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor h, Tensor statistics)",
        backend,
        module,
        "forward_add",
        empty_forward_add,
    )
    Op(
        "layer_norm_bwd(Tensor dy, Tensor h, Tensor? weight, Tensor statistics, Tensor? dh,"
        " ScalarType? sums) -> (Tensor dx, Tensor sums)",
        backend,
        module,
        "backward",
        empty_backward,
    )


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx, dw and db; None for what is not wanted."""
    h, weight, statistics = ctx.saved_tensors
    if dy is None:
        # y took no part in the loss: only the residual stream carries a gradient, as in eager mode
        return dh, None, None
    N = h.shape[-1]
    name = f"layer_norm_bwd.{ctx.backend}"
    dx, sums = gradient(name, unit_rows(dy), h, weight, statistics, dh, ctx.sums)
    dw, db = (sums[part] if wanted else None for part, wanted in zip(
        (slice(0, N), slice(N, None)), ctx.wanted, strict=True
    ))  # fmt: skip
    return dx, dw, db


def _note(ctx: Any, weight: Tensor | None, bias: Tensor | None, wanted: tuple[bool, bool]) -> None:
    """Which sums the backward owes, and in which dtype."""
    present = weight if weight is not None else bias
    ctx.wanted = wanted
    ctx.sums = present.dtype if present is not None and any(wanted) else None
    ctx.set_materialize_grads(False)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return operator(f"layer_norm_fwd.{backend}")(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, ctx.backend = inputs
        _note(ctx, weight, bias, ctx.needs_input_grad[1:3])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, dy, None), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> Any:
        _refuse_batched_weights(in_dims[1:3])
        y, statistics = _LayerNorm.apply(x.movedim(in_dims[0], 0), *rest)
        return (y, statistics.view(2, info.batch_size, -1)), (0, 1)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return operator(f"add_layer_norm_fwd.{backend}")(x, residual, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, _, ctx.backend = inputs
        _, h, statistics = output
        _note(ctx, weight, bias, ctx.needs_input_grad[2:4])
        ctx.mark_non_differentiable(statistics)
        ctx.dtypes = x.dtype, residual.dtype
        ctx.save_for_backward(h, weight, statistics)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        d, dw, db = _differentiate(ctx, dy, None if dh is None else unit_rows(dh))
        dx, dresidual = (None if d is None else d.to(dtype) for dtype in ctx.dtypes)
        return dx, dresidual, dw, db, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, residual: Tensor, *rest: Any) -> Any:
        _refuse_batched_weights(in_dims[2:4])
        x, residual = (
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in zip((x, residual), in_dims[:2], strict=True)
        )
        y, h, statistics = _AddLayerNorm.apply(x, residual, *rest)
        return (y, h, statistics.view(2, info.batch_size, -1)), (0, 0, 1)


def _refuse_batched_weights(in_dims: tuple[int | None, ...]) -> None:
    if any(dim is not None for dim in in_dims):
        raise NotImplementedError(
            "layer_norm: vmap over the weight or bias is not provided by fused backends; allowed: "
            "vmap over x and residual. Use implementation='eager' to vmap over the others."
        )
