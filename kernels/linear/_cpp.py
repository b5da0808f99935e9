"""Projections in C++ (csrc/linear.cpp), for CPUs: few rows, or weights in int8.

With a row or some, as in decoding, the time goes into reading the weights: each is read once, by
threads that are torch's, several projections of the same x in one call. Past MAX_ROWS torch
computes, but never with int8: those are read at any number of rows, and nothing else is made of
them. Where gradients are wanted, under autocast and in a graph being traced, eager.py serves.
Rounding as there, but that the scale multiplies the sum; the same bits with any number of threads.
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
_WEIGHTS = Struct("=4Q2q")
_NO_WEIGHTS = [bytes(_WEIGHTS.size * n) for n in range(MAX_WEIGHTS + 1)]


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Every projection of x."""
    K = x.shape[-1]
    M = x.numel() // max(K, 1)
    if scales is None:
        scales = (None,) * len(weights)
    if not _served(x, M, weights, biases, scales):
        return eager.linear(x, weights, biases, scales)
    found, packed, kept = [], [], []
    leading = x.shape[:-1]
    for weight, bias, scale in zip(weights, biases, scales, strict=True):
        y = torch.empty((*leading, weight.shape[0]), dtype=x.dtype)
        # names for the copies, which must outlive the call
        weight = unit_rows(weight)
        bias, scale = (t if t is None else t.contiguous() for t in (bias, scale))
        kept += [weight, bias, scale]
        at = (0 if t is None else t.data_ptr() for t in (weight, bias, scale, y))
        packed.append(_WEIGHTS.pack(*at, weight.shape[0], weight.stride(0)))
        found.append(y)
    x, x_stride = as_rows(x)
    threads, count = torch.get_num_threads(), len(found)
    head = _CALL.pack(x.data_ptr(), TYPE_CODES[x.dtype], M, K, x_stride, count, threads)
    if call("swathe_linear", b"".join((head, *packed, _NO_WEIGHTS[MAX_WEIGHTS - count]))):
        raise MemoryError(f"linear: no memory for {M} rows of {K} features")
    return tuple(found)


def _served(
    x: Tensor,
    M: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
) -> bool:
    """Whether C++ computes this call."""
    full = [w for w, s in zip(weights, scales, strict=True) if s is None]
    if M == 0 or len(weights) > MAX_WEIGHTS or (full and MAX_ROWS[x.dtype] < M):
        return False
    like = [x, *full, *(b for b in biases if b is not None)]
    tensors = (*like, *weights, *(s for s in scales if s is not None))
    return (
        plain(tensors)
        and not differentiating(*tensors)
        and all(t.dtype == x.dtype for t in like)
        and all(s is None or s.dtype == torch.float32 for s in scales)
        and not torch.is_autocast_enabled("cpu")
    )
