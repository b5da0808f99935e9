"""Linear cross-entropy as torch sees it: schemas, fakes, and the two autograd nodes.

"mean" and "sum" make their gradients in the forward, where the logits are at hand, and the backward
only multiplies them by the one number that arrives: three matrix products in all. "none" cannot
know what arrives at each row, so its backward multiplies the logits out again: four products.

Saved     the inputs; for "mean" and "sum" the needed gradients in fp32, for "none" two fp32
          numbers a row. Inputs that need no gradient cost neither products nor memory.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          torch.func.grad works; torch.func.vmap works over hidden and labels with "none".
Autocast  as torch's linear: hidden, weight and bias are cast to autocast's dtype.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.losses import LossOptions, divisor, empty_losses
from swathe.kernels.core.op import Op, apply, differentiating, gradient, operator, transformed

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_NUMBERS = "int ignore_index, float smoothing, float softcap, float scale, float z_loss, int rows"
_defined: set[str] = set()


def fused(backend: str, module: str) -> Callable[..., Tensor]:
    """A differentiable linear_cross_entropy over `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"linear_cross_entropy_rows_fwd.{backend}")

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        reduction: str,
        num_items: Tensor | float | None,
        chunk_rows: int | None,
    ) -> Tensor:
        numbers = (*options, chunk_rows or 0)
        hidden, weight, bias = _as_autocast_would(hidden, weight, bias)
        differentiate = differentiating(hidden, weight, bias)
        if reduction == "none" and differentiate:
            return apply(_Rows, hidden, weight, bias, labels, *numbers, backend)[0]
        if differentiate:
            needs = _needs(hidden, weight, bias)
            total = apply(_Total, hidden, weight, bias, labels, *numbers, needs, backend)[0]
        else:
            losses = forward(hidden, weight, bias, labels, *numbers)[0]
            if reduction == "none":
                return losses
            total = losses.sum()
        if reduction == "sum":
            return total
        return total / divisor(labels, options.ignore_index, num_items)

    return linear_cross_entropy


def _as_autocast_would(*tensors: Tensor | None) -> list[Any]:
    dtype = autocast_dtype(next(t for t in tensors if t is not None))
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts a matrix product of `x` to where it is on, else None."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    # torch.func hides from a tensor that an outer transform differentiates it
    known = not transformed()
    return tuple(t is not None and (t.requires_grad or not known) for t in tensors)


def _empty_total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dh, dw, db = (
        torch.empty(shape if need else (0,), **fp32)
        for shape, need in zip(shapes, rest[-1], strict=True)
    )
    return torch.empty((), **fp32), dh, dw, db


def _empty_rounded(
    arriving: Tensor, dh: Tensor, dw: Tensor, db: Tensor, hidden: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rounded = (torch.empty_like(t, dtype=hidden.dtype) for t in (dh, dw, db))
    return next(rounded), next(rounded), next(rounded)


def _empty_backward(
    arriving: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, dh, dw, db = _empty_total(hidden, weight, bias, rest[0], rest[-1])
    return _empty_rounded(arriving, dh, dw, db, hidden)


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    Op(
        f"linear_cross_entropy_rows_fwd({_INPUTS}, {_NUMBERS})"
        " -> (Tensor losses, Tensor peak, Tensor log_sum)",
        backend,
        module,
        "forward",
        lambda hidden, weight, bias, labels, *_: empty_losses(hidden, labels),
    )
    Op(
        f"linear_cross_entropy_fwd({_INPUTS}, {_NUMBERS}, bool[] needs)"
        " -> (Tensor total, Tensor dh, Tensor dw, Tensor db)",
        backend,
        module,
        "forward_total",
        _empty_total,
    )
    Op(
        "linear_cross_entropy_bwd(Tensor arriving, Tensor dh, Tensor dw, Tensor db,"
        " Tensor hidden, Tensor weight, Tensor? bias) -> (Tensor dh, Tensor dw, Tensor db)",
        backend,
        module,
        "backward_total",
        _empty_rounded,
    )
    Op(
        f"linear_cross_entropy_rows_bwd(Tensor arriving, {_INPUTS}, Tensor peak, Tensor log_sum,"
        f" {_NUMBERS}, bool[] needs) -> (Tensor dh, Tensor dw, Tensor db)",
        backend,
        module,
        "backward",
        _empty_backward,
    )


def _wanted(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *inputs, needs, backend = args
        return operator(f"linear_cross_entropy_fwd.{backend}")(*inputs, list(needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.needs, ctx.backend = inputs
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *inputs[:3])

    @staticmethod
    def backward(ctx: Any, arriving: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if arriving is None:
            return (None,) * ctx.count
        name = f"linear_cross_entropy_bwd.{ctx.backend}"
        found = gradient(name, arriving, *ctx.saved_tensors)
        return (*_wanted(found, ctx.needs), *(None,) * (ctx.count - 3))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        raise NotImplementedError(
            "linear_cross_entropy: vmap is provided by fused backends for reduction='none' only; "
            "use that and reduce afterwards, or implementation='eager'"
        )


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, backend = args
        return operator(f"linear_cross_entropy_rows_fwd.{backend}")(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, _, _, _, _, _, ctx.backend = inputs
        ctx.numbers, ctx.count = inputs[4:10], len(inputs)
        _, peak, log_sum = output
        ctx.mark_non_differentiable(peak, log_sum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, peak, log_sum)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if arriving is None:
            return (None,) * ctx.count
        needs = tuple(ctx.needs_input_grad[:3])
        name = f"linear_cross_entropy_rows_bwd.{ctx.backend}"
        found = gradient(name, arriving, *ctx.saved_tensors, *ctx.numbers, list(needs))
        return (*_wanted(found, needs), *(None,) * (ctx.count - 3))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        *rest: Any,
    ) -> Any:
        if in_dims[1] is not None or in_dims[2] is not None:
            raise NotImplementedError(
                "linear_cross_entropy: vmap over weight or bias is not provided by fused backends; "
                "allowed: vmap over hidden and labels. Use implementation='eager'."
            )
        hidden, labels = (
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in ((hidden, in_dims[0]), (labels, in_dims[3]))
        )
        return _Rows.apply(hidden, weight, bias, labels, *rest), (0, 0, 0)
