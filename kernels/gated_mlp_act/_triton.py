"""Gated activations in Triton: every input is read once each way, whatever the length of a row.

    y = act(gate) * up        dgate = dy * up * act'(gate)        dup = dy * act(gate)

    silu       x * s(x)               s(z) = 1 / (1 + exp(-z)), c = 1 - s
    gelu_tanh  x * s(z)               z = 2 sqrt(2 / pi) * (x + 0.044715 x^3), since s(2v) is
                                      (1 + tanh(v)) / 2
    gelu       x * Phi(x)             Phi the normal distribution function
    relu       max(x, 0)              relu2 its square
    gpt_oss    (u + 1) * g * s(alpha * g),  g = min(gate, limit),  u = clamp(up, -limit, limit)

Shapes   M rows of N features.  gate, up, dy: (..., N) with one row stride each.  y, dgate, dup:
         dense.  Packed x, dx: (..., 2N), "halves" [gate | up] or "interleaved" [gate, up] pairs.
         Copied first: features that are not adjacent, leading dimensions without one stride.
Rounding all arithmetic is fp32, each result is rounded once; LLAMA rounds y where HF's code does
         (eager.py), gradients are the same for both.  `limit` is rounded to the inputs' dtype.
Special  infinite gates give what torch's formulas give (silu(-inf) is NaN), finite ones never NaN.
         The gradient passes a clamp up to and at its limit; relu's at 0 is 0.
Traffic  at b bytes an element: forward 3*M*N*b, backward 5*M*N*b, packed or not.
Order    elements do not depend on each other: bit-equal reruns, the same in any batch.
Source   Shazeer 2020, arXiv:2002.05202; gpt_oss: transformers' GptOssExperts.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.device import guard
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import as_rows
from swathe.kernels.core.tl_math import logistic, normal, tanh
from swathe.kernels.gated_mlp_act.op import (
    empty_backward,
    empty_backward_packed,
    empty_forward,
    empty_forward_packed,
)

# elements a tile: 16 a thread, two 16-byte loads of bf16 for each tensor (one on 64-wide waves)
TILE, WARPS = 2048, 4
WARPS_BACKWARD_INTERLEAVED = 8  # with 4, sm_100 spills where it takes pairs apart and joins them
# columns of a tile of strided rows: the widest that a row fills
WIDTHS = (2048, 512, 64, 8)
_LONG = 2**31  # 32-bit column numbers end here

_BETA = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_KAPPA = tl.constexpr(0.044715)
_FLAT_FROM = tl.constexpr(16.0)  # beyond, s(z) of gelu_tanh is 0 or 1 in fp32


@triton.jit
def _act(x, alpha, ACT: tl.constexpr):
    """act(x) and its derivative; gpt_oss without its clamps and without up + 1."""
    if ACT == "silu":
        s, c = logistic(x)
        return x * s, s + x * (s * c)
    elif ACT == "gpt_oss":
        s, c = logistic(alpha * x)
        return x * s, s + alpha * (x * (s * c))
    elif ACT == "gelu_tanh":
        # x^2 may overflow, but where it could the derivative of s is 0
        near = tl.minimum(tl.maximum(x, -_FLAT_FROM), _FLAT_FROM)
        square = near * near
        s, c = logistic(2.0 * _BETA * near * (1.0 + _KAPPA * square))
        return x * s, s + x * (s * c) * (2.0 * _BETA + 6.0 * _BETA * _KAPPA * square)
    elif ACT == "gelu":
        area, density = normal(x)
        return x * area, area + x * density
    elif ACT == "relu":
        # a comparison that NaN passes
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.where(x <= 0, 0.0, x)
        return positive * positive, 2.0 * positive


@triton.jit
def _clamped(gate, up, limit):
    """g and u of gpt_oss, NaN kept."""
    g = tl.where(gate > limit, limit, gate)
    return g, tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit
def _gated(gate, up, limit, alpha, ACT: tl.constexpr, LLAMA: tl.constexpr):
    """y in fp32, of blocks as they were loaded."""
    dtype: tl.constexpr = gate.dtype
    limit = limit.to(dtype).to(tl.float32)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if ACT == "gpt_oss":
        gate, up = _clamped(gate, up, limit)
        up = up + 1.0
    if LLAMA and ACT == "gpt_oss":
        s, _ = logistic((alpha * gate).to(dtype).to(tl.float32))
        a = gate * s.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
    elif LLAMA and ACT == "gelu_tanh":
        # torch's own form: its 1 + tanh cancels far left, which 16 bits show
        a = 0.5 * gate * (1.0 + tanh(_BETA * (gate + _KAPPA * gate * gate * gate)))
    else:
        a, _ = _act(gate, alpha, ACT)
    if LLAMA:
        a = a.to(dtype).to(tl.float32)
    return a * up


@triton.jit
def _gradients(dy, gate, up, limit, alpha, ACT: tl.constexpr):
    """dgate and dup in fp32, of blocks as they were loaded."""
    limit = limit.to(gate.dtype).to(tl.float32)
    dy, gate, up = dy.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
    if ACT == "gpt_oss":
        g, u = _clamped(gate, up, limit)
        a, slope = _act(g, alpha, ACT)
        # NaN is outside the clamp, as in torch
        dgate = tl.where(gate <= limit, dy * (u + 1.0) * slope, 0.0)
        return dgate, tl.where((up >= -limit) & (up <= limit), dy * a, 0.0)
    a, slope = _act(gate, alpha, ACT)
    dgate = dy * up * slope
    if ACT == "relu" or ACT == "relu2":
        # also where up or dy is infinite
        dgate = tl.where(gate <= 0, 0.0, dgate)
    return dgate, dy * a


@triton.jit
def _place(N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of this program's tile, and its first column."""
    tiles = tl.cdiv(N, BLOCK_N)
    p = tl.program_id(0)
    m = (p // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, (p % tiles) * BLOCK_N


@triton.jit(do_not_specialize=["M"])
def _forward(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, N, M, limit, alpha,
    ACT: tl.constexpr, LLAMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of two tensors a program."""
    # torch.compile may pass a Python float as fp64, which would promote every line below
    limit, alpha = tl.cast(limit, tl.float32), tl.cast(alpha, tl.float32)
    m, first = _place(N, BLOCK_M, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    gate = tl.load(gate_ptr + m[:, None] * gate_stride + n[None, :], live, other=0.0)  # [M, N]
    up = tl.load(up_ptr + m[:, None] * up_stride + n[None, :], live, other=0.0)
    y = _gated(gate, up, limit, alpha, ACT, LLAMA)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["M"])
def _forward_interleaved(
    x_ptr, y_ptr, x_stride, N, M, limit, alpha,
    ACT: tl.constexpr, LLAMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N pairs a row a program."""
    limit, alpha = tl.cast(limit, tl.float32), tl.cast(alpha, tl.float32)
    m, first = _place(N, BLOCK_M, BLOCK_N)
    n, both = first + tl.arange(0, BLOCK_N), 2 * first + tl.arange(0, 2 * BLOCK_N)
    live = (m < M)[:, None] & (both < 2 * N)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_stride + both[None, :], live, other=0.0)  # [M, 2N]
    gate, up = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N, 2)))
    y = _gated(gate, up, limit, alpha, ACT, LLAMA).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, (m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, d_stride, N,
    M, limit, alpha, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of two tensors a program; d_stride is that of both gradients' rows."""
    limit, alpha = tl.cast(limit, tl.float32), tl.cast(alpha, tl.float32)
    m, first = _place(N, BLOCK_M, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    dy = tl.load(dy_ptr + m[:, None] * dy_stride + n[None, :], live, other=0.0)  # [M, N]
    gate = tl.load(gate_ptr + m[:, None] * gate_stride + n[None, :], live, other=0.0)
    up = tl.load(up_ptr + m[:, None] * up_stride + n[None, :], live, other=0.0)
    dgate, dup = _gradients(dy, gate, up, limit, alpha, ACT)
    dense = m[:, None] * d_stride + n[None, :]
    tl.store(dgate_ptr + dense, dgate.to(dgate_ptr.dtype.element_ty), live)
    tl.store(dup_ptr + dense, dup.to(dup_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["M"])
def _backward_interleaved(
    dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, N, M, limit, alpha,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N pairs a row a program."""
    limit, alpha = tl.cast(limit, tl.float32), tl.cast(alpha, tl.float32)
    m, first = _place(N, BLOCK_M, BLOCK_N)
    n, both = first + tl.arange(0, BLOCK_N), 2 * first + tl.arange(0, 2 * BLOCK_N)
    live = (m < M)[:, None] & (both < 2 * N)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_stride + both[None, :], live, other=0.0)  # [M, 2N]
    dy_at = dy_ptr + m[:, None] * dy_stride + n[None, :]
    dy = tl.load(dy_at, (m < M)[:, None] & (n < N)[None, :], other=0.0)  # [M, N]
    gate, up = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N, 2)))
    dgate, dup = _gradients(dy, gate, up, limit, alpha, ACT)
    dx = tl.join(dgate.to(dx_ptr.dtype.element_ty), dup.to(dx_ptr.dtype.element_ty))
    dx = tl.reshape(dx, (BLOCK_M, 2 * BLOCK_N))
    tl.store(dx_ptr + m[:, None] * (2 * N) + both[None, :], dx, live)


_forward_at = Launcher(_forward)
_forward_interleaved_at = Launcher(_forward_interleaved)
_backward_at = Launcher(_backward)
_backward_interleaved_at = Launcher(_backward_interleaved)


class Tiling(NamedTuple):
    """How a launch sees its tensors: M rows of N features in tiles of rows by columns."""

    M: int
    N: int
    rows: int
    columns: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """One program a tile."""
        return cdiv(self.M, self.rows) * cdiv(self.N, self.columns), 1, 1


def tiling(M: int, N: int, dense: bool) -> Tiling:
    """Tiles of M rows; `dense` rows follow each other without a gap and are taken as one row."""
    if dense and M * N < _LONG:
        return Tiling(1, M * N, 1, TILE)
    columns = next((width for width in WIDTHS if width <= N), WIDTHS[-1])
    return Tiling(M, N, TILE // columns, columns)


def forward(gate: Tensor, up: Tensor, act: str, limit: float, alpha: float, casting: str) -> Tensor:
    """y of two tensors."""
    y = empty_forward(gate, up)
    if y.numel():
        (gate, gate_stride), (up, up_stride) = as_rows(gate), as_rows(up)
        _launch_forward(gate, up, y, gate_stride, up_stride, act, limit, alpha, casting)
    return y


def forward_packed(
    x: Tensor, act: str, limit: float, alpha: float, casting: str, packed: str
) -> Tensor:
    """y of one packed tensor."""
    y = empty_forward_packed(x)
    if not y.numel():
        return y
    N = y.shape[-1]
    x, x_stride = as_rows(x)
    if packed == "halves":
        up = x.narrow(-1, N, N)
        _launch_forward(x, up, y, x_stride, x_stride, act, limit, alpha, casting)
        return y
    M, N, rows, columns = tiles = tiling(y.numel() // N, N, x_stride == 2 * N)
    with guard(x):
        _forward_interleaved_at(
            tiles.grid,
            (x, y),
            (x_stride, N),
            (M, float(limit), float(alpha)),
            (act, casting == "llama", rows, columns),
            WARPS,
        )
    return y


def _launch_forward(
    gate: Tensor,
    up: Tensor,
    y: Tensor,
    gate_stride: int,
    up_stride: int,
    act: str,
    limit: float,
    alpha: float,
    casting: str,
) -> None:
    N = y.shape[-1]
    M, N, rows, columns = tiles = tiling(y.numel() // N, N, gate_stride == up_stride == N)
    with guard(gate):
        _forward_at(
            tiles.grid,
            (gate, up, y),
            (gate_stride, up_stride, N),
            (M, float(limit), float(alpha)),
            (act, casting == "llama", rows, columns),
            WARPS,
        )


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, limit: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """dgate and dup."""
    dgate, dup = empty_backward(dy, gate, up)
    if dgate.numel():
        (gate, gate_stride), (up, up_stride) = as_rows(gate), as_rows(up)
        tensors, strides = (gate, up, dgate, dup), (gate_stride, up_stride, dgate.shape[-1])
        _launch_backward(dy, tensors, strides, act, limit, alpha)
    return dgate, dup


def backward_packed(
    dy: Tensor, x: Tensor, act: str, limit: float, alpha: float, packed: str
) -> Tensor:
    """The gradient of one packed tensor, in its layout."""
    dx = empty_backward_packed(dy, x)
    if not dx.numel():
        return dx
    N = dx.shape[-1] // 2
    x, x_stride = as_rows(x)
    if packed == "halves":
        tensors = (x, x.narrow(-1, N, N), dx, dx.narrow(-1, N, N))
        _launch_backward(dy, tensors, (x_stride, x_stride, 2 * N), act, limit, alpha)
        return dx
    dy, dy_stride = as_rows(dy)
    dense = x_stride == 2 * N and dy_stride == N
    M, N, rows, columns = tiles = tiling(dy.numel() // N, N, dense)
    with guard(x):
        _backward_interleaved_at(
            tiles.grid,
            (dy, x, dx),
            (dy_stride, x_stride, N),
            (M, float(limit), float(alpha)),
            (act, rows, columns),
            WARPS_BACKWARD_INTERLEAVED,
        )
    return dx


def _launch_backward(
    dy: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    strides: tuple[int, int, int],
    act: str,
    limit: float,
    alpha: float,
) -> None:
    N = dy.shape[-1]
    dy, dy_stride = as_rows(dy)
    dense = dy_stride == N and strides == (N, N, N)
    M, N, rows, columns = tiles = tiling(dy.numel() // N, N, dense)
    with guard(dy):
        _backward_at(
            tiles.grid,
            (dy, *tensors),
            (dy_stride, *strides, N),
            (M, float(limit), float(alpha)),
            (act, rows, columns),
            WARPS,
        )
