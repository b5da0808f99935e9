"""Attention's backward on Hopper in a single pass: what it serves, descriptors, and the launches.

Shapes, masks and stats are those of _triton.py. Only where paths.py says "gluon_fused", because
parts of dq are added by atomics and reruns differ in its last bits.

Floor    10 T S D flops a head for D = E and full masks, where the two kernels of _gluon_backward.py
         need 14; besides them dq is zeroed, added to and rounded in fp32, which takes memory for
         B H T D numbers.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention import _gluon, _gluon_backward_fused
from swathe.kernels.attention._gluon import box_of, descriptors
from swathe.kernels.attention._gluon_backward import (
    numbers_of_rows,
    plain_numbers,
    readable,
    room_for_rows,
)
from swathe.kernels.attention._gluon_blocks import COMPUTE, COPY, REGISTERS, boxes
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.op import empty_backward
from swathe.kernels.core.device import guard
from swathe.kernels.core.gluon import TensorDescriptor, gl
from swathe.kernels.core.launch import Launcher, cdiv

__all__ = ["backward", "why_not"]

_GROUP = 64  # keys and rows of a warpgroup's product

_backward_rows_at = Launcher(_gluon_backward_fused.backward_rows)
_backward_fused_at = Launcher(_gluon_backward_fused.backward_fused)

# stages of queries, by the wider head: no spill in a loop, every exponential beside a product
# (tests/offline). None has been timed yet.
_STAGES = {64: 3, 128: 2}


def why_not(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> str | None:
    """Why this kernel cannot serve a call, or None: what was given, and what is allowed."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on, and atomics add in no fixed order"
    if (found := _gluon.why_not(q, k, v, rows)) is not None:
        return found
    D, E = q.shape[3], v.shape[3]
    if boxes(D) not in ((64,), (128,)) or len(boxes(E)) != 1 or E > 128:
        return f"heads have {D} and {E} features; allowed: those of one box, up to 128, q's over 32"
    if max(D, E) > 64 and (rows.softcap or rows.alibi is not None):
        return f"a softcap or alibi with heads of {max(D, E)} features; allowed: up to 64"
    return None


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the rows' statistics, as op.py says; `rest` are the fields of Rows.

    A do that the TMA cannot read, such as an expanded one, is copied.
    """
    dq, dk, dv, stats = empty_backward(do, dlse, q, k, v, o, lse)
    rows, (B, H, T, D), (K, S, E) = Rows(*rest), q.shape, v.shape[1:]
    if not B * H * T:
        return dq, dk.zero_(), dv.zero_(), stats
    do, q, k, v, o = readable(do, q, k, v, o)
    seen, reach, whole = room_for_rows(q, stats)
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    stages = _STAGES[max(*boxes(D), *boxes(E), 64)]
    with guard(q):
        _backward_rows_at(
            (cdiv(T, 2 * _GROUP) * H * B, 1, 1),
            (do, dlse, o, lse, stats, seen, reach, whole, rows.first, rows.last),
            (*do.stride()[:3], *o.stride()[:3], *rows.bounds, E),
            (T, S, H),
            (cdiv(E, 64),),
            num_warps=4,
        )
        _backward_fused_at(
            (cdiv(S, 2 * _GROUP) * K * B, 1, 1),
            (reach, whole, rows.places, rows.alibi, *numbers_of_rows(stats, seen, _GROUP),
             *_halves(k), descriptors(v, _GROUP)[0], *_halves(q), descriptors(do, _GROUP)[0],
             _sums(total), *_halves(dk), descriptors(dv, _GROUP)[0]),
            rows.strides(H)[:2],
            plain_numbers(q, k, rows),
            (*rows.flags, stages, COMPUTE, COPY),
            num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip
        torch.mul(total, float(rows.scale), out=dq)
    return dq, dk, dv, stats


def _halves(t: Tensor) -> tuple[Any, Any]:
    """Two descriptors of one kind, as the kernel has a box for either half of the features."""
    box = box_of(t, _GROUP, boxes(t.shape[3])[0] // 2)
    return box, box


def _sums(total: Tensor) -> Any:
    """A descriptor of half the features of fp32 sums."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    box = [1, 1, _GROUP, boxes(total.shape[3])[0] // 2]
    return TensorDescriptor(total, list(total.shape), list(total.stride()), box, layout)
