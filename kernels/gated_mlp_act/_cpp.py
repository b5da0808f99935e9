"""Gated activations in C++ (csrc/gated_mlp_act.cpp): tensors in, tensors out, no checks; for CPUs.

The formulas and roundings are those of eager.py. Elements do not depend on each other, so results
are the same bits with any number of threads, which are torch's.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from swathe.kernels.core.cpp import TYPE_CODES, call
from swathe.kernels.core.rows import as_rows
from swathe.kernels.gated_mlp_act.op import (
    empty_backward,
    empty_backward_packed,
    empty_forward,
    empty_forward_packed,
)

# Gated of csrc/gated_mlp_act.cpp: tensors, strides and sizes, switches, limit and alpha
_PACKED = Struct("=5Q6q5q2d")
_ACTS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "gpt_oss": 5}


def forward(gate: Tensor, up: Tensor, act: str, limit: float, alpha: float, casting: str) -> Tensor:
    """y of two tensors."""
    y = empty_forward(gate, up)
    if y.numel():
        (gate, gate_stride), (up, up_stride) = as_rows(gate), as_rows(up)
        tensors = (0, gate.data_ptr(), up.data_ptr(), y.data_ptr(), 0)
        N = y.shape[-1]
        numbers = _numbers(gate, act, limit, alpha, casting, False)
        _run("forward", tensors, (0, gate_stride, up_stride, N), y.numel(), N, numbers)
    return y


def forward_packed(
    x: Tensor, act: str, limit: float, alpha: float, casting: str, packed: str
) -> Tensor:
    """y of one packed tensor."""
    y = empty_forward_packed(x)
    if y.numel():
        x, stride = as_rows(x)
        N, pairs = y.shape[-1], packed == "interleaved"
        at, up = _halves(x, N, pairs)
        numbers = _numbers(x, act, limit, alpha, casting, pairs)
        _run("forward", (0, at, up, y.data_ptr(), 0), (0, stride, stride, N), y.numel(), N, numbers)
    return y


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, limit: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """dgate and dup."""
    dgate, dup = empty_backward(dy, gate, up)
    if dy.numel():
        (dy, dy_stride), (gate, gate_stride), (up, up_stride) = map(as_rows, (dy, gate, up))
        tensors = tuple([t.data_ptr() for t in (dy, gate, up, dgate, dup)])
        N = dgate.shape[-1]
        numbers = _numbers(gate, act, limit, alpha, "fp32", False)
        _run("backward", tensors, (dy_stride, gate_stride, up_stride, N), dy.numel(), N, numbers)
    return dgate, dup


def backward_packed(
    dy: Tensor, x: Tensor, act: str, limit: float, alpha: float, packed: str
) -> Tensor:
    """The gradient of the packed tensor, in its layout."""
    dx = empty_backward_packed(dy, x)
    if dy.numel():
        (dy, dy_stride), (x, stride) = as_rows(dy), as_rows(x)
        N, pairs = dy.shape[-1], packed == "interleaved"
        tensors = (dy.data_ptr(), *_halves(x, N, pairs), *_halves(dx, N, pairs))
        numbers = _numbers(x, act, limit, alpha, "fp32", pairs)
        _run("backward", tensors, (dy_stride, stride, stride, 2 * N), dy.numel(), N, numbers)
    return dx


def _halves(x: Tensor, N: int, pairs: bool) -> tuple[int, int]:
    first = x.data_ptr()
    return first, 0 if pairs else first + N * x.element_size()


def _numbers(
    x: Tensor, act: str, limit: float, alpha: float, casting: str, pairs: bool
) -> tuple[float, ...]:
    switches = TYPE_CODES[x.dtype], _ACTS[act], casting == "llama", pairs
    return *switches, torch.get_num_threads(), limit, alpha


def _run(
    way: str,
    tensors: tuple[int, ...],
    strides: tuple[int, int, int, int],
    count: int,
    N: int,
    numbers: tuple[float, ...],
) -> None:
    # rows that follow each other without a gap are one row
    M, N = (1, count) if strides[1:] == (N, N, N) and strides[0] in (0, N) else (count // N, N)
    call(f"swathe_gated_mlp_act_{way}", _PACKED.pack(*tensors, *strides, M, N, *numbers))
