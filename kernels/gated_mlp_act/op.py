"""gated_mlp_act as torch sees it: schemas, fakes, and the autograd nodes around the launchers.

A backend file offers `forward` and `backward` for two tensors, `forward_packed` and
`backward_packed` for one; `fused(name, module)` turns the four into one differentiable function.

Saved     the inputs themselves; act(gate), which HF's eager code keeps as well, is recomputed.
Packed    one input has one gradient, written in the input's layout: nothing is concatenated.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          torch.func.grad and torch.func.vmap work.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.op import Op, apply, differentiating, gradient, operator
from swathe.kernels.core.rows import unit_rows

_NUMBERS = "str act, float limit, float alpha"
_defined: set[str] = set()


def empty_forward(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    """Uninitialised y: gate's shape and dtype, contiguous."""
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def empty_forward_packed(x: Tensor, *_: Any) -> Tensor:
    """Uninitialised y: half as many features as x."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def empty_backward(dy: Tensor, gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised dgate and dup, contiguous."""
    return empty_forward(gate, up), empty_forward(up, gate)


def empty_backward_packed(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Uninitialised gradient of the packed tensor, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fused(backend: str, module: str) -> Callable[..., Tensor]:
    """A differentiable gated_mlp_act over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward = operator(f"gated_mlp_act_fwd.{backend}")
    forward_packed = operator(f"packed_gated_mlp_act_fwd.{backend}")

    def gated_mlp_act(
        gate: Tensor,
        up: Tensor | None,
        act: str,
        limit: float,
        alpha: float,
        casting: str,
        packed: str,
    ) -> Tensor:
        if up is None:
            if differentiating(gate):
                return apply(_Packed, gate, act, limit, alpha, casting, packed, backend)
            return forward_packed(gate, act, limit, alpha, casting, packed)
        if differentiating(gate, up):
            return apply(_Gated, gate, up, act, limit, alpha, casting, backend)
        return forward(gate, up, act, limit, alpha, casting)

    return gated_mlp_act


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    Op(
        f"gated_mlp_act_fwd(Tensor gate, Tensor up, {_NUMBERS}, str casting) -> Tensor",
        backend,
        module,
        "forward",
        empty_forward,
    )
    Op(
        f"gated_mlp_act_bwd(Tensor dy, Tensor gate, Tensor up, {_NUMBERS})"
        " -> (Tensor dgate, Tensor dup)",
        backend,
        module,
        "backward",
        empty_backward,
    )
    Op(
        f"packed_gated_mlp_act_fwd(Tensor x, {_NUMBERS}, str casting, str packed) -> Tensor",
        backend,
        module,
        "forward_packed",
        empty_forward_packed,
    )
    Op(
        f"packed_gated_mlp_act_bwd(Tensor dy, Tensor x, {_NUMBERS}, str packed) -> Tensor",
        backend,
        module,
        "backward_packed",
        empty_backward_packed,
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        gate: Tensor, up: Tensor, act: str, limit: float, alpha: float, casting: str, backend: str
    ) -> Tensor:
        return operator(f"gated_mlp_act_fwd.{backend}")(gate, up, act, limit, alpha, casting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, *ctx.numbers, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if dy is None:
            return None, None, *nothing
        name = f"gated_mlp_act_bwd.{ctx.backend}"
        found = gradient(name, unit_rows(dy), *ctx.saved_tensors, *ctx.numbers)
        pairs = zip(found, ctx.needs_input_grad, strict=False)
        return *(d if needed else None for d, needed in pairs), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], gate: Tensor, up: Tensor, *rest: Any) -> Any:
        gate, up = (
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in zip((gate, up), in_dims[:2], strict=True)
        )
        return _Gated.apply(gate, up, *rest), 0


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, act: str, limit: float, alpha: float, casting: str, packed: str, backend: str
    ) -> Tensor:
        launch = operator(f"packed_gated_mlp_act_fwd.{backend}")
        return launch(x, act, limit, alpha, casting, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *numbers, _, packed, ctx.backend = inputs
        ctx.numbers = (*numbers, packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if dy is None:
            return None, *nothing
        name = f"packed_gated_mlp_act_bwd.{ctx.backend}"
        return gradient(name, unit_rows(dy), *ctx.saved_tensors, *ctx.numbers), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> Any:
        return _Packed.apply(x.movedim(in_dims[0], 0), *rest), 0
