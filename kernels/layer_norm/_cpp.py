"""LayerNorm in C++ (csrc/layer_norm.cpp): tensors in, tensors out, no checks; for CPUs.

The formulas and roundings are those of eager.py. Every row is computed alike whatever the number
of threads; dw and db are summed over blocks of rows whose number depends on M alone, so they too
are the same bits with any number of threads. Threads are torch's.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from swathe.kernels.core.cpp import NO_TENSOR, TYPE_CODES, call
from swathe.kernels.core.rows import as_rows
from swathe.kernels.layer_norm.op import empty_backward, empty_forward, empty_forward_add

# LayerForwardArguments and LayerBackwardArguments of csrc/layer_norm.cpp
_FORWARD = Struct("=7Q8qdq")
_BACKWARD = Struct("=7Q9q")


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y and the statistics of x."""
    y, statistics = empty_forward(x)
    _run_forward(x, None, weight, bias, y, None, statistics, eps)
    return y, statistics


def forward_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and the statistics of h = x + residual."""
    y, h, statistics = empty_forward_add(x, residual)
    _run_forward(x, residual, weight, bias, y, h, statistics, eps)
    return y, h, statistics


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    statistics: Tensor,
    eps: float,
) -> None:
    M, N = statistics.shape[1], x.shape[-1]
    if M == 0:
        return
    x, x_stride = as_rows(x)
    r, r_stride = (None, 0) if residual is None else as_rows(residual)
    w, b = _dense(weight), _dense(bias)
    packed = _FORWARD.pack(
        x.data_ptr(),
        _address(r),
        _address(w),
        _address(b),
        y.data_ptr(),
        _address(h),
        statistics.data_ptr(),
        TYPE_CODES[x.dtype],
        _code(r),
        _code(b if w is None else w),
        TYPE_CODES[y.dtype],
        x_stride,
        r_stride,
        M,
        N,
        eps,
        torch.get_num_threads(),
    )
    _raise_if(call("swathe_layer_norm_forward", packed), N)


def backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    dh: Tensor | None,
    sums: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """dx, to which dh is added where the residual stream carries a gradient of its own; dw, db."""
    M, N = statistics.shape[1], h.shape[-1]
    dx, total = empty_backward(dy, h, weight, statistics, dh, sums)
    if M == 0:
        return dx, total.zero_()
    dy, dy_stride = as_rows(dy)
    h, h_stride = as_rows(h)
    d, d_stride = (None, 0) if dh is None else as_rows(dh)
    w = _dense(weight)
    packed = _BACKWARD.pack(
        dy.data_ptr(),
        h.data_ptr(),
        _address(w),
        statistics.data_ptr(),
        _address(d),
        dx.data_ptr(),
        total.data_ptr(),
        TYPE_CODES[h.dtype],
        _code(w),
        NO_TENSOR if sums is None else TYPE_CODES[sums],
        dy_stride,
        h_stride,
        d_stride,
        M,
        N,
        torch.get_num_threads(),
    )
    _raise_if(call("swathe_layer_norm_backward", packed), N)
    return dx, total


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _code(t: Tensor | None) -> int:
    return NO_TENSOR if t is None else TYPE_CODES[t.dtype]


def _raise_if(failed: int, N: int) -> None:
    if failed:
        raise MemoryError(f"layer_norm: no memory for the scratch rows of {N} features")
