"""Rows sorted into contiguous groups, one a matrix: expert MLPs without padding or atomics.

    T tokens, k experts a token, S = T k rows, E experts; `ends[e]` is where group e ends
    order   (S,)    row j of the sorted rows is pair order[j] = token * k + slot
    inverse (S,)    pair i lies at row inverse[i]

Every scatter of the forward or the backward is written as a gather by the other of the two, so no
element is added to by two threads: results and gradients are the same bits in every run, and sums
over a token's experts run in the order of its slots.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.op import Op, apply

ALIGNED = 16  # bytes that torch's grouped kernel wants a row to be a multiple of
_BIAS_ROWS = 8  # the shortest inner dimension that is aligned in 16-bit formats


@dataclass(frozen=True, slots=True)
class Groups:
    """Where each (token, slot) pair goes: order and inverse (T k,), ends (E,) int32."""

    order: Tensor
    inverse: Tensor
    ends: Tensor
    slots: int

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Groups:
        """Groups of `chosen` (T, k): one stable sort, and no question to the device."""
        experts, order = torch.sort(chosen.reshape(-1), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        numbers = torch.arange(num_experts, device=order.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return cls(order, inverse, ends, chosen.shape[1])


def dispatch(x: Tensor, groups: Groups) -> Tensor:
    """Each token's row once for every expert it goes to, sorted: (T, N) to (S, N)."""
    return apply(_Dispatch, x, groups.order, groups.inverse, groups.slots)


def combine(y: Tensor, scores: Tensor, groups: Groups) -> Tensor:
    """Sum over slots of scores (T, k) times the rows of y (S, N): (T, N) in fp32 or wider."""
    return apply(_Combine, y, scores, groups.order, groups.inverse)


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, ends: Tensor, transposed: bool
) -> Tensor:
    """Group e of x (S, K) times matrix e of `weight`, plus row e of `bias` (E, N): (S, N).

    Shapes: weight (E, N, K) as nn.Linear has it, or (E, K, N) where `transposed`. Autocast lowers
    all three, as it does for F.linear.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        lower = torch.get_autocast_dtype(kind)
        x, weight = x.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    y = grouped_mm(x, weight if transposed else weight.transpose(1, 2), ends)
    if bias is None:
        return y
    # as a product with ones: its gradient is then a product as well, and no sum by index
    ones = x.new_ones(x.shape[0], _BIAS_ROWS)
    rows = F.pad(bias.unsqueeze(1), (0, 0, 0, _BIAS_ROWS - 1))
    return y + grouped_mm(ones, rows, ends)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x[ends[e - 1] : ends[e]] @ weight[e] for every e: (S, K), (E, K, N) to (S, N).

    torch's grouped kernel, which needs no word from the host, where it serves; else a loop over the
    groups that have rows, which has to know their sizes. On meta the shape is all there is.
    """
    if x.is_meta:
        return x.new_empty(x.shape[0], weight.shape[2])
    if x.shape[0] and has_kernel(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    return apply(_GroupedMM, x, weight, ends)


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product is one kernel for tensors like these."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and all(size * x.itemsize % ALIGNED == 0 for size in weight.shape[1:])
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
        return x[order // slots]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.slots = inputs[3]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        total = _sum_of_slots(dy, inverse, ctx.slots)
        return total.to(dy.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, scores: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return _sum_of_slots(y, inverse, scores.shape[1], scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, scores, order, inverse = ctx.saved_tensors
        rows = dout[order // scores.shape[1]]
        dy = rows * scores.reshape(-1)[order].unsqueeze(1)
        dscores = (rows * y).sum(1)[inverse].view_as(scores)
        return dy.to(y.dtype), dscores.to(scores.dtype), None, None


def _sum_of_slots(
    rows: Tensor, inverse: Tensor, slots: int, scores: Tensor | None = None
) -> Tensor:
    """Rows (S, N) of each token added up in the order of its slots, in fp32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    where = inverse.view(-1, slots)
    total: Tensor | None = None
    for slot in range(slots):
        part = rows[where[:, slot]].to(wide)
        if scores is not None:
            part = part * scores[:, slot, None]
        total = part if total is None else total + part
    assert total is not None
    return total


class _GroupedMM(torch.autograd.Function):
    """The loop; its derivative is made of it and of _GroupedOuter, to any order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return _mm(x, weight, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = grouped_mm(dy, weight.transpose(1, 2), ends)
        if ctx.needs_input_grad[1]:
            # in the memory order of the parameter, or autograd would copy it once more
            if weight.stride(1) == 1 and weight.stride(2) != 1:
                dweight = apply(_GroupedOuter, dy, x, ends).transpose(1, 2)
            else:
                dweight = apply(_GroupedOuter, x, dy, ends)
        return dx, dweight, None


class _GroupedOuter(torch.autograd.Function):
    """a[group e].T @ b[group e] for every e: (S, K), (S, N) to (E, K, N)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return _outer(a, b, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, ends = ctx.saved_tensors
        return grouped_mm(b, d.transpose(1, 2), ends), grouped_mm(a, d, ends), None


# an exported program calls the operators where gradients may be on, and out= allows none
@torch.no_grad()
def launch_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grouped_mm by one product a group."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    return out


@torch.no_grad()
def launch_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The sum of outer products of each group's rows; zero for a group without."""
    out = empty_outer(a, b, ends)
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(a[start:end].t(), b[start:end], out=out[e])
        else:
            out[e].zero_()
        start = end
    return out


def empty_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Uninitialised result of launch_mm."""
    return x.new_empty(x.shape[0], weight.shape[2])


def empty_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Uninitialised result of launch_outer."""
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


# operators, because a trace cannot follow a loop over sizes that only the tensor knows
_mm = Op("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor", "loop", __name__,
         "launch_mm", empty_mm)  # fmt: skip
_outer = Op("grouped_outer(Tensor a, Tensor b, Tensor ends) -> Tensor", "loop", __name__,
            "launch_outer", empty_outer)  # fmt: skip
