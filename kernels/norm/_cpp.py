"""RMSNorm in C++ (csrc/norm.cpp): tensors in, tensors out, no checks; for CPUs.

The formulas and roundings are those of eager.py. Every row is computed alike whatever the number
of threads; dw is summed over blocks of rows whose number depends on M alone, so it too is the same
bits with any number of threads. Threads are torch's: torch.set_num_threads governs them.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from swathe.kernels.core.cpp import NO_TENSOR, TYPE_CODES, call
from swathe.kernels.core.rows import as_rows
from swathe.kernels.norm.op import empty_backward, empty_forward, empty_forward_add

# ForwardArguments and BackwardArguments of csrc/norm.cpp
_FORWARD = Struct("=6Q8q2d2q")
_BACKWARD = Struct("=7Q8qdq")


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """y and rstd of x."""
    y, rstd = empty_forward(x, weight, eps, offset, casting)
    _run_forward(x, None, weight, y, None, rstd, eps, offset, casting)
    return y, rstd


def forward_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and rstd of h = x + residual."""
    y, h, rstd = empty_forward_add(x, residual, weight, eps, offset, casting)
    _run_forward(x, residual, weight, y, h, rstd, eps, offset, casting)
    return y, h, rstd


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    casting: str,
) -> None:
    M, N = rstd.shape[0], x.shape[-1]
    if M == 0:
        return
    x, x_stride = as_rows(x)
    weight = weight.contiguous()
    r, r_stride = (None, 0) if residual is None else as_rows(residual)
    packed = _FORWARD.pack(
        x.data_ptr(),
        0 if r is None else r.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        0 if h is None else h.data_ptr(),
        rstd.data_ptr(),
        TYPE_CODES[x.dtype],
        NO_TENSOR if r is None else TYPE_CODES[r.dtype],
        TYPE_CODES[weight.dtype],
        TYPE_CODES[y.dtype],
        x_stride,
        r_stride,
        M,
        N,
        eps,
        offset,
        casting == "llama",
        torch.get_num_threads(),
    )
    _raise_if(call("swathe_rms_norm_forward", packed), N)


def backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dh: Tensor | None,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """dx, to which dh is added where the residual stream carries a gradient of its own, and dw."""
    M, N = rstd.shape[0], h.shape[-1]
    dx, dw = empty_backward(dy, h, weight, rstd, dh, offset)
    if M == 0:
        return dx, dw.zero_()
    dy, dy_stride = as_rows(dy)
    h, h_stride = as_rows(h)
    weight = weight.contiguous()
    d, d_stride = (None, 0) if dh is None else as_rows(dh)
    packed = _BACKWARD.pack(
        dy.data_ptr(),
        h.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        0 if d is None else d.data_ptr(),
        dx.data_ptr(),
        dw.data_ptr(),
        TYPE_CODES[dy.dtype],
        TYPE_CODES[h.dtype],
        TYPE_CODES[weight.dtype],
        dy_stride,
        h_stride,
        d_stride,
        M,
        N,
        offset,
        torch.get_num_threads(),
    )
    _raise_if(call("swathe_rms_norm_backward", packed), N)
    return dx, dw


def _raise_if(failed: int, N: int) -> None:
    if failed:
        raise MemoryError(f"rms_norm: no memory for the scratch rows of {N} features")
