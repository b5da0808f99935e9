"""Projections of few rows in C++ (csrc/linear.cpp), for CPUs; more rows are torch's.

With a row or some, as in decoding, the time goes into reading the weights: each is read once, by
threads that are torch's, several projections of the same x in one call. Past MAX_ROWS, where
gradients are wanted, under autocast and in a graph being traced, torch computes.
Rounding as eager.py; the same bits with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from swathe.kernels.core.cpp import TYPE_CODES, call
from swathe.kernels.core.op import differentiating, plain
from swathe.kernels.core.rows import as_rows, unit_rows
from swathe.kernels.linear import eager

# rows of x past which torch's products are faster; csrc/linear.cpp holds at most 16
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 16}
MAX_WEIGHTS = 4
# LinearArguments of csrc/linear.cpp, and one Weights each
_CALL = Struct("=Q6q")
_WEIGHTS = Struct("=3Q2q")
_NO_WEIGHTS = [bytes(_WEIGHTS.size * n) for n in range(MAX_WEIGHTS + 1)]


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Every projection of x."""
    K = x.shape[-1]
    M = x.numel() // max(K, 1)
    few = 0 < M <= MAX_ROWS[x.dtype] and len(weights) <= MAX_WEIGHTS
    tensors = (x, *weights, *(b for b in biases if b is not None))
    if (
        not few
        or not plain(tensors)
        or differentiating(*tensors)
        or any(t.dtype != x.dtype for t in tensors)
        or torch.is_autocast_enabled("cpu")
    ):
        return eager.linear(x, weights, biases)
    found, packed, kept = [], [], []
    leading = x.shape[:-1]
    for weight, bias in zip(weights, biases, strict=True):
        y = torch.empty((*leading, weight.shape[0]), dtype=x.dtype)
        # names for the copies, which must outlive the call
        weight, bias = unit_rows(weight), bias if bias is None else bias.contiguous()
        kept += [weight, bias]
        at = 0 if bias is None else bias.data_ptr()
        N, stride = weight.shape[0], weight.stride(0)
        packed.append(_WEIGHTS.pack(weight.data_ptr(), at, y.data_ptr(), N, stride))
        found.append(y)
    x, x_stride = as_rows(x)
    threads, count = torch.get_num_threads(), len(found)
    head = _CALL.pack(x.data_ptr(), TYPE_CODES[x.dtype], M, K, x_stride, count, threads)
    if call("swathe_linear", b"".join((head, *packed, _NO_WEIGHTS[MAX_WEIGHTS - count]))):
        raise MemoryError(f"linear: no memory for {M} rows of {K} features")
    return tuple(found)
