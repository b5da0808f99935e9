"""Cross-entropy as torch sees it: schemas, fakes, and the autograd node around the row kernels.

The node gives one loss a row; the reduction is torch's own, so what arrives at a row in the
backward of "mean" or "sum" is one number expanded, which the kernels read as such.

Saved     logits, labels and two fp32 numbers a row; nothing of the size of the logits is made.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          torch.func.grad works, and torch.func.vmap over logits and labels.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.losses import LossOptions, empty_losses, reduced
from swathe.kernels.core.op import Op, apply, differentiating, gradient, operator

_NUMBERS = "int ignore_index, float smoothing, float softcap, float scale, float z_loss"
_defined: set[str] = set()


def fused(backend: str, module: str) -> Callable[..., Tensor]:
    """A differentiable cross_entropy over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"cross_entropy_fwd.{backend}")

    def cross_entropy(
        logits: Tensor,
        labels: Tensor,
        options: LossOptions,
        reduction: str,
        num_items: Tensor | float | None,
    ) -> Tensor:
        numbers = tuple(options)
        if differentiating(logits):
            losses = apply(_CrossEntropy, logits, labels, *numbers, backend)[0]
        else:
            losses = forward(logits, labels, *numbers)[0]
        return reduced(losses, labels, options.ignore_index, reduction, num_items)

    return cross_entropy


def _empty_gradient(arriving: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    Op(
        f"cross_entropy_fwd(Tensor logits, Tensor labels, {_NUMBERS})"
        " -> (Tensor losses, Tensor peak, Tensor log_sum)",
        backend,
        module,
        "forward",
        empty_losses,
    )
    Op(
        "cross_entropy_bwd(Tensor arriving, Tensor logits, Tensor labels, Tensor peak,"
        f" Tensor log_sum, {_NUMBERS}) -> Tensor",
        backend,
        module,
        "backward",
        _empty_gradient,
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *numbers, backend = rest
        return operator(f"cross_entropy_fwd.{backend}")(logits, labels, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, *ctx.numbers, ctx.backend = inputs
        _, peak, log_sum = output
        ctx.mark_non_differentiable(peak, log_sum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, peak, log_sum)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if arriving is None or not ctx.needs_input_grad[0]:
            return None, *nothing
        name = f"cross_entropy_bwd.{ctx.backend}"
        return gradient(name, arriving, *ctx.saved_tensors, *ctx.numbers), *nothing

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], logits: Tensor, labels: Tensor, *rest: Any
    ) -> Any:
        logits, labels = (
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in zip((logits, labels), in_dims[:2], strict=True)
        )
        return _CrossEntropy.apply(logits, labels, *rest), (0, 0, 0)
