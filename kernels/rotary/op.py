"""rotary as torch sees it: schemas, fakes, and the autograd node around the launchers.

A backend file offers `forward` and `backward`; `fused(name, module)` turns the two into one
differentiable function. Nothing here imports a backend before its first call.

Saved     the tables and positions alone: the gradient is dy turned back, without q and k.
Autograd  first order only: second derivatives and forward mode raise, they are never silently 0.
          The tables carry no gradient. torch.func.grad works; torch.func.vmap over q and k works,
          over tables and positions it raises.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.op import Op, any_batched, apply, differentiating, gradient, operator
from swathe.kernels.core.rotation import angles
from swathe.kernels.core.rows import empty_as, unit_rows

_OPERANDS = (
    "Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, int[]? mrope_section,"
    " int rotary_dim, bool interleaved"
)
_defined: set[str] = set()


def empty(q: Tensor, k: Tensor | None, *_: Any) -> list[Tensor]:
    """Uninitialised results for q and, where there is one, k: what a launcher fills."""
    return [empty_as(q)] if k is None else [empty_as(q), empty_as(k)]


def launchers(run: Callable[..., list[Tensor]]) -> tuple[Callable[..., list[Tensor]], ...]:
    """A backend's `forward` and `backward` from run(q, k, angles, pairs, rounded, back).

    `pairs` is (rotary_dim, interleaved); `rounded` asks for casting "llama" with its own roundings.
    """

    def forward(q: Tensor, k: Tensor | None, cos: Tensor, *layout: Any) -> list[Tensor]:
        *rotation, casting = layout
        rounded = casting == "llama" and cos.dtype == q.dtype
        return run(q, k, angles(cos, *rotation), rotation[-2:], rounded, False)

    def backward(dq: Tensor, dk: Tensor | None, cos: Tensor, *layout: Any) -> list[Tensor]:
        return run(dq, dk, angles(cos, *layout), layout[-2:], False, True)

    return forward, backward


def fused(backend: str, module: str) -> Callable[..., Any]:
    """A differentiable rotary over the launchers of `module`, named `backend` in traces."""
    if backend not in _defined:
        _defined.add(backend)
        schema = f"rotary_fwd({_OPERANDS}, str casting) -> Tensor[]"
        Op(schema, backend, module, "forward", empty)
        Op(f"rotary_bwd({_OPERANDS}) -> Tensor[]", backend, module, "backward", empty)
    forward = operator(f"rotary_fwd.{backend}")

    def rotary(q: Tensor, k: Tensor | None, *options: Any) -> Tensor | tuple[Tensor, Tensor]:
        if differentiating(q, k):
            found = apply(_Rotary, q, k, *options, backend)
        else:
            found = forward(q, k, *options)
        return found[0] if k is None else (found[0], found[1])

    return rotary


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *options, backend = rest
        return tuple(operator(f"rotary_fwd.{backend}")(q, k, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, cos, sin, positions, *ctx.layout, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        # an output that took no part in the loss costs nothing and leaves no gradient
        present = [unit_rows(d) for d in (dq, dk) if d is not None]
        if not present:
            return None, None, *rest
        first, second = present[0], present[1] if len(present) == 2 else None
        name = f"rotary_bwd.{ctx.backend}"
        found = iter(gradient(name, first, second, *ctx.saved_tensors, *ctx.layout))
        to_q, to_k = (None if d is None else next(found) for d in (dq, dk))
        return to_q, to_k, *rest

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], q: Tensor, k: Tensor | None, *rest: Any) -> Any:
        if any_batched(in_dims[2:]):
            raise NotImplementedError(
                "rotary: vmap over tables or positions is not provided by fused backends; allowed: "
                "vmap over q and k. Use implementation='eager' for the others."
            )
        # every head of a token is turned alike, so the batch can stand among the heads
        among = [_among_heads(t, dim) for t, dim in zip((q, k), in_dims[:2], strict=True)]
        found = apply(_Rotary, *among, *rest)
        dims = [None if dim is None else 1 for dim in in_dims[: len(found)]]
        outputs = (
            y if dim is None else y.unflatten(1, (info.batch_size, -1))
            for y, dim in zip(found, dims, strict=True)
        )
        return tuple(outputs), tuple(dims)


def _among_heads(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 1).flatten(1, 2)
