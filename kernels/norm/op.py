"""RMSNorm as torch sees it: schemas, fakes, and the autograd node around a backend's launchers.

A backend file offers `forward`, `forward_add` and `backward`; `fused(name, module)` turns the
three into one differentiable function. Nothing here imports a backend before its first call.

Saved     h, weight and rstd: what HF's eager norm keeps, less its two intermediate copies.
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


def output_dtype(h: torch.dtype, weight: torch.dtype, casting: str) -> torch.dtype:
    """dtype of y: "llama" promotes with the weight as HF does, the other castings keep h's."""
    return torch.promote_types(h, weight) if casting == "llama" else h


def empty_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Uninitialised y (x's shape, contiguous) and rstd (M,) in fp32: what a launcher fills."""
    dtype = x.dtype if x.dtype == weight.dtype else output_dtype(x.dtype, weight.dtype, casting)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, torch.empty(prod(x.shape[:-1]), dtype=torch.float32, device=x.device)


def empty_forward_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised y, h and rstd; h has the dtype of `x + residual`."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    y, rstd = empty_forward(h, weight, eps, offset, casting)
    return y, h, rstd


def empty_backward(
    dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    """Uninitialised dx (h's shape and dtype, contiguous) and dw."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format)


def fused(backend: str, module: str) -> Callable[..., Any]:
    """A differentiable rms_norm over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"rms_norm_fwd.{backend}")
    forward_add = operator(f"add_rms_norm_fwd.{backend}")

    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, residual: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        differentiate = differentiating(x, weight, residual)
        if residual is None:
            if differentiate:
                return apply(_RMSNorm, x, weight, eps, offset, casting, backend)[0]
            return forward(x, weight, eps, offset, casting)[0]
        if differentiate:
            y, h, _ = apply(_AddRMSNorm, x, residual, weight, eps, offset, casting, backend)
        else:
            y, h, _ = forward_add(x, residual, weight, eps, offset, casting)
        return y, h

    return rms_norm


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    Op(
        "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, str casting)"
        " -> (Tensor y, Tensor rstd)",
        backend,
        module,
        "forward",
        empty_forward,
    )
    Op(
        "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps,"
        " float offset, str casting) -> (Tensor y, Tensor h, Tensor rstd)",
        backend,
        module,
        "forward_add",
        empty_forward_add,
    )
    Op(
        "rms_norm_bwd(Tensor dy, Tensor h, Tensor weight, Tensor rstd, Tensor? dh,"
        " float offset) -> (Tensor dx, Tensor dw)",
        backend,
        module,
        "backward",
        empty_backward,
    )


def _differentiate(
    ctx: Any, dy: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    h, weight, rstd = ctx.saved_tensors
    if dy is None:
        # y took no part in the loss: only the residual stream carries a gradient, as in eager mode
        return dh, None
    backward = f"rms_norm_bwd.{ctx.backend}"
    dx, dw = gradient(backward, unit_rows(dy), h, weight, rstd, dh, ctx.offset)
    return dx, dw if ctx.needs_weight else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        return operator(f"rms_norm_fwd.{backend}")(x, weight, eps, offset, casting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.offset, _, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.needs_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        dx, dw = _differentiate(ctx, dy, None)
        return dx, dw, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, *rest: Any) -> Any:
        _refuse_batched_weight(in_dims[1])
        y, rstd = _RMSNorm.apply(x.movedim(in_dims[0], 0), weight, *rest)
        return (y, rstd.view(info.batch_size, -1)), (0, 0)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float,
        casting: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        launch = operator(f"add_rms_norm_fwd.{backend}")
        return launch(x, residual, weight, eps, offset, casting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, _, ctx.offset, _, ctx.backend = inputs
        _, h, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, residual.dtype
        ctx.needs_weight = ctx.needs_input_grad[2]
        ctx.save_for_backward(h, weight, rstd)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        d, dw = _differentiate(ctx, dy, None if dh is None else unit_rows(dh))
        dx, dresidual = (None if d is None else d.to(dtype) for dtype in ctx.dtypes)
        return dx, dresidual, dw, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, residual: Tensor, weight: Tensor, *rest: Any
    ) -> Any:
        _refuse_batched_weight(in_dims[2])
        x, residual = (
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in zip((x, residual), in_dims[:2], strict=True)
        )
        y, h, rstd = _AddRMSNorm.apply(x, residual, weight, *rest)
        return (y, h, rstd.view(info.batch_size, -1)), (0, 0, 0)


def _refuse_batched_weight(in_dim: int | None) -> None:
    if in_dim is not None:
        raise NotImplementedError(
            "rms_norm: vmap over the weight is not provided by fused backends; allowed: vmap over "
            "x and residual. Use implementation='eager' to vmap over the weight."
        )
