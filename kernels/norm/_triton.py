"""RMSNorm in Triton: each input is read once going forward and once going backward (N <= 8192).

    h[m, n]  = x[m, n] + residual[m, n]                   h = x without a residual
    rstd[m]  = 1 / sqrt(mean_n(h[m, n]^2) + eps)          xhat = h * rstd
    y[m, n]  = xhat[m, n] * (offset + w[n])               g = dy * (offset + w)
    dx[m, n] = rstd[m] * (g[m, n] - xhat[m, n] * mean_n(g * xhat)[m]) + dh[m, n]
    dw[n]    = sum_m(dy[m, n] * xhat[m, n])

Shapes   M rows (all leading dims), N features, P programs.  x, residual, h, y, dy, dh, dx: (..., N)
         with one row stride.  weight, dw: (N,).  rstd: (M,) fp32.  partial: (P, N) fp32.
Rounding all arithmetic is fp32.  h is rounded to its dtype before it is squared, as `x + residual`
         is in torch.  y is rounded once; LLAMA rounds xhat to h's dtype before the weight.
Traffic  at b bytes an element, forward 2*M*N*b (4*M*N*b with a residual), backward 3*M*N*b +
         8*P*N (4*M*N*b with dh).  A row longer than a tile is read twice, the second time mostly
         from L2; a backward of such rows reads h and dy twice from memory (5*M*N*b).
Order    a row's block sizes depend on N alone, so its y and dx are bitwise the same in any batch.
         dw is summed in a fixed order that depends on M, N and the number of multiprocessors:
         bit-equal reruns on one kind of device, no atomics.
Source   Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.device import guard, multiprocessors
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.partials import sum_partials
from swathe.kernels.core.row_blocks import ROW_LIMIT_FORWARD, row_blocks, whole_rows_backward
from swathe.kernels.core.rows import as_rows
from swathe.kernels.core.tune import Blocks, Tunable, around
from swathe.kernels.norm.op import empty_backward, empty_forward, empty_forward_add


@triton.jit(do_not_specialize=["M"])
def _forward_rows(
    x_ptr, r_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, x_stride, r_stride, N, M, eps, offset,
    ADD: tl.constexpr, LLAMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    # torch.compile may pass a Python float as fp64, which would promote every line below
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    dense = m[:, None] * N + n[None, :]

    h = tl.load(x_ptr + m[:, None] * x_stride + n[None, :], live, other=0.0)  # [M, N]
    if ADD:
        r = tl.load(r_ptr + m[:, None] * r_stride + n[None, :], live, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + dense, h, live)
    xhat = h.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(xhat * xhat, 1) / N + eps)  # [M]
    tl.store(rstd_ptr + m, rstd, m < M)

    w = tl.load(w_ptr + n, n < N, other=0.0).to(tl.float32)  # [N]
    xhat = xhat * rstd[:, None]
    if LLAMA:
        xhat = xhat.to(h.dtype).to(tl.float32)
    y = xhat * (offset + w)[None, :]
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["M"])
def _forward_wide(
    x_ptr, r_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, x_stride, r_stride, N, M, eps, offset,
    ADD: tl.constexpr, LLAMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_N columns at a time: once for the statistics, once for y."""
    tl.static_assert(BLOCK_M == 1)
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    m = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        h = tl.load(x_ptr + m * x_stride + n, live, other=0.0)  # [N]
        if ADD:
            r = tl.load(r_ptr + m * r_stride + n, live, other=0.0)
            h = (h.to(tl.float32) + r.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + m * N + n, h, live)
        squares += h.to(tl.float32) * h.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / N + eps)
    tl.store(rstd_ptr + m, rstd)

    if ADD:
        tl.debug_barrier()  # h is read back below, perhaps by other threads than wrote it
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        if ADD:
            h = tl.load(h_ptr + m * N + n, live, other=0.0)
        else:
            h = tl.load(x_ptr + m * x_stride + n, live, other=0.0)
        w = tl.load(w_ptr + n, live, other=0.0).to(tl.float32)
        xhat = h.to(tl.float32) * rstd
        if LLAMA:
            xhat = xhat.to(h.dtype).to(tl.float32)
        tl.store(y_ptr + m * N + n, (xhat * (offset + w)).to(y_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["M"])
def _backward_rows(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, partial_ptr, dy_stride, h_stride, dh_stride,
    N, M, offset, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P programs stride over tiles of whole rows; each keeps its share of dw in registers."""
    offset = tl.cast(offset, tl.float32)
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    scale = offset + tl.load(w_ptr + n, n < N, other=0.0).to(tl.float32)  # [N]
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for tile in range(p, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (m < M)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + m[:, None] * dy_stride + n[None, :], live, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + m[:, None] * h_stride + n[None, :], live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + m, m < M, other=0.0)[:, None]
        xhat = h * rstd
        g = dy * scale[None, :]
        dx = rstd * (g - xhat * (tl.sum(g * xhat, 1) / N)[:, None])
        if ADD:
            dh_at = dh_ptr + m[:, None] * dh_stride + n[None, :]
            dx += tl.load(dh_at, live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m[:, None] * N + n[None, :], dx.to(dx_ptr.dtype.element_ty), live)
        dw += dy * xhat

    tl.store(partial_ptr + tl.cast(p, tl.int64) * N + n, tl.sum(dw, 0), n < N)


@triton.jit
def _backward_dots(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dot_ptr, dy_stride, h_stride, N, offset, BLOCK_N: tl.constexpr
):  # fmt: skip
    """mean_n(g * xhat) of one row a program, for rows that take several tiles."""
    offset = tl.cast(offset, tl.float32)
    m = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        dy = tl.load(dy_ptr + m * dy_stride + n, live, other=0.0).to(tl.float32)  # [N]
        h = tl.load(h_ptr + m * h_stride + n, live, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + n, live, other=0.0).to(tl.float32)
        products += dy * (offset + w) * h
    tl.store(dot_ptr + m, tl.sum(products, 0) * tl.load(rstd_ptr + m) / N)


@triton.jit(do_not_specialize=["M"])
def _backward_columns(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, partial_ptr, dot_ptr, dy_stride, h_stride,
    dh_stride, N, M, offset, ADD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and a share of dw for BLOCK_N columns; programs of axis 1 stride over the rows."""
    offset = tl.cast(offset, tl.float32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    live = n < N
    scale = offset + tl.load(w_ptr + n, live, other=0.0).to(tl.float32)  # [N]
    dw = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(p, M, tl.num_programs(1)):
        m = tl.cast(row, tl.int64)
        dy = tl.load(dy_ptr + m * dy_stride + n, live, other=0.0).to(tl.float32)  # [N]
        h = tl.load(h_ptr + m * h_stride + n, live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + m)
        xhat = h * rstd
        dx = rstd * (dy * scale - xhat * tl.load(dot_ptr + m))
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride + n, live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), live)
        dw += dy * xhat

    tl.store(partial_ptr + tl.cast(p, tl.int64) * N + n, dw, live)


_forward_rows_at = Launcher(_forward_rows)
_forward_wide_at = Launcher(_forward_wide)
_backward_rows_at = Launcher(_backward_rows)
_backward_dots_at = Launcher(_backward_dots)
_backward_columns_at = Launcher(_backward_columns)


def forward_blocks(N: int) -> Blocks:
    """Tile of the forward for rows of N features; it may not depend on the number of rows."""
    return row_blocks(N, N <= ROW_LIMIT_FORWARD)


def backward_blocks(N: int) -> Blocks:
    """Tile of the backward for rows of N features."""
    return row_blocks(N, whole_rows_backward(N))


FORWARD = Tunable(
    "rms_norm",
    "forward",
    forward_blocks,
    lambda N: around(forward_blocks(N), taller=N <= ROW_LIMIT_FORWARD),
)
BACKWARD = Tunable(
    "rms_norm",
    "backward",
    backward_blocks,
    lambda N: around(backward_blocks(N), taller=whole_rows_backward(N)),
)


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """y and rstd of x."""
    y, rstd = empty_forward(x, weight, eps, offset, casting)
    _launch_forward(x, None, weight, y, y, rstd, eps, offset, casting)
    return y, rstd


def forward_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and rstd of h = x + residual."""
    y, h, rstd = empty_forward_add(x, residual, weight, eps, offset, casting)
    _launch_forward(x, residual, weight, y, h, rstd, eps, offset, casting)
    return y, h, rstd


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    h: Tensor,
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
    r, r_stride = (x, x_stride) if residual is None else as_rows(residual)
    launcher = _forward_rows_at if N <= ROW_LIMIT_FORWARD else _forward_wide_at
    block_m, block_n, warps = FORWARD(N, x)
    with guard(x):
        launcher(
            (cdiv(M, block_m), 1, 1),
            (x, r, weight, y, h, rstd),
            (x_stride, r_stride, N),
            (M, float(eps), float(offset)),
            (residual is not None, casting == "llama", block_m, block_n),
            warps,
        )


def backward(
    dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    """dx, to which dh is added where the residual stream carries a gradient of its own, and dw."""
    M, N = rstd.shape[0], h.shape[-1]
    dx, dw = empty_backward(dy, h, weight, rstd, dh, offset)
    if M == 0:
        return dx, dw.zero_()
    dy, dy_stride = as_rows(dy)
    h, h_stride = as_rows(h)
    weight = weight.contiguous()
    d, d_stride = (dy, dy_stride) if dh is None else as_rows(dh)
    tensors = (dy, h, weight, rstd, d, dx)
    strides = (dy_stride, h_stride, d_stride, N)
    block_m, block_n, warps = BACKWARD(N, h)
    with guard(h):
        if whole_rows_backward(N):
            # as many programs as fit on the device at once, so that none starts late
            P = min(cdiv(M, block_m), multiprocessors(h.device) * max(1, 16 // warps))
            partial = torch.empty(P, N, dtype=torch.float32, device=h.device)
            _backward_rows_at(
                (P, 1, 1),
                (*tensors, partial),
                strides,
                (M, float(offset)),
                (dh is not None, block_m, block_n),
                warps,
            )
        else:
            partial = _backward_wide(tensors, strides, M, offset, dh is not None)
        sum_partials(partial, dw)
    return dx, dw


def _backward_wide(
    tensors: tuple[Tensor, ...], strides: tuple[int, ...], M: int, offset: float, add: bool
) -> Tensor:
    dy, h, weight, rstd, _, _ = tensors
    dy_stride, h_stride, _, N = strides
    _, block_n, warps = BACKWARD(N, h)
    dot = torch.empty_like(rstd)
    _backward_dots_at(
        (M, 1, 1),
        (dy, h, weight, rstd, dot),
        (dy_stride, h_stride, N),
        (float(offset),),
        (block_n,),
        warps,
    )
    columns = cdiv(N, block_n)
    P = min(M, cdiv(4 * multiprocessors(h.device), columns))
    partial = torch.empty(P, N, dtype=torch.float32, device=h.device)
    _backward_columns_at(
        (columns, P, 1),
        (*tensors, partial, dot),
        strides,
        (M, float(offset)),
        (add, block_n),
        warps,
    )
    return partial
