"""LayerNorm in Triton: each input is read once each way, of rows up to 8192.

    h[m, n]  = x[m, n] + residual[m, n]                  h = x without a residual
    xhat     = (h - mean) * rstd,  rstd = 1 / sqrt(mean_n((h - mean)^2) + eps)
    y[m, n]  = xhat * w[n] + b[n]                        g = dy * w
    dx[m, n] = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat)) + dh[m, n]
    dw[n]    = sum_m(dy * xhat),  db[n] = sum_m(dy)

Shapes   M rows (all leading dims), N features, P programs.  x, residual, h, y, dy, dh, dx: (..., N)
         with one row stride.  w, b: (N,).  statistics: mean over rstd, (2, M) fp32.  sums: dw and
         db end to end, (2N,).  partial: (P, 2N) fp32.
Rounding all arithmetic is fp32, the variance is that of centred values; y and the gradients are
         rounded once, h before its statistics are taken, as `x + residual` is in torch.
Traffic  at b bytes an element, forward 2*M*N*b (4*M*N*b with a residual), backward 3*M*N*b +
         16*P*N (4*M*N*b with dh).  A row longer than a tile is read twice, the second time mostly
         from L2; a backward of such rows reads h and dy twice from memory (5*M*N*b).
Order    a row's block sizes depend on N alone, so its y and dx are bitwise the same in any batch.
         dw and db are summed in a fixed order that depends on M, N and the number of
         multiprocessors: bit-equal reruns on one kind of device, no atomics.
Source   Ba, Kiros & Hinton 2016, arXiv:1607.06450; tiles' statistics are merged as in Chan, Golub &
         LeVeque 1983, eq. 2.1; sums of means as in Knuth, TAOCP 2, 4.2.2, theorem B.
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
from swathe.kernels.layer_norm.op import empty_backward, empty_forward, empty_forward_add


@triton.jit(do_not_specialize=["M"])
def _forward_rows(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, statistics_ptr, x_stride, r_stride, N, M, eps,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    # torch.compile may pass a Python float as fp64, which would promote every line below
    eps = tl.cast(eps, tl.float32)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    live = (m < M)[:, None] & (n < N)[None, :]
    dense = m[:, None] * N + n[None, :]

    h = tl.load(x_ptr + m[:, None] * x_stride + n[None, :], live, other=0.0)  # [M, N]
    if ADD:
        r = tl.load(r_ptr + m[:, None] * r_stride + n[None, :], live, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + dense, h, live)
    h = h.to(tl.float32)
    mean = tl.sum(h, 1) / N  # [M]
    centred = tl.where(live, h - mean[:, None], 0.0)
    # rows far from zero lose the digits that the sum rounds off; those are found again here
    lost = tl.sum(centred, 1) / N
    mean += lost
    centred = tl.where(live, centred - lost[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)

    y = centred * rstd[:, None]
    if WEIGHT:
        y *= tl.load(w_ptr + n, n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), live)
    tl.store(statistics_ptr + m, mean, m < M)
    tl.store(statistics_ptr + M + m, rstd, m < M)


@triton.jit(do_not_specialize=["M"])
def _forward_wide(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, h_ptr, statistics_ptr, x_stride, r_stride, N, M, eps,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_N columns at a time: once for the statistics, once for y."""
    tl.static_assert(BLOCK_M == 1)
    eps = tl.cast(eps, tl.float32)
    m = tl.program_id(0).to(tl.int64)
    mean = tl.zeros((1,), tl.float32)  # of the columns so far
    rest = tl.zeros((1,), tl.float32)  # what the mean's sum has rounded off
    squares = tl.zeros((1,), tl.float32)  # sum of squares about the mean
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        h = tl.load(x_ptr + m * x_stride + n, live, other=0.0)  # [N]
        if ADD:
            r = tl.load(r_ptr + m * r_stride + n, live, other=0.0)
            h = (h.to(tl.float32) + r.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + m * N + n, h, live)
        h = h.to(tl.float32)
        count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        own = tl.sum(h, 0) / count
        off = tl.where(live, h - own, 0.0)
        lost = tl.sum(off, 0) / count
        off = tl.where(live, off - lost, 0.0)
        total = start + count
        # the first tile's mean is taken as it is: its sum with 0 would round off what was lost
        mean = tl.where(start == 0, own, mean)
        shift = (own - mean) + (lost - rest)
        step = shift * (count / total)
        moved = mean + step
        back = moved - mean
        rest += (mean - (moved - back)) + (step - back)
        mean = moved
        squares += tl.sum(off * off, 0) + shift * shift * (start * (count / total))
    rstd = 1.0 / tl.sqrt_rn(squares / N + eps)
    row = m + tl.zeros((1,), tl.int64)
    tl.store(statistics_ptr + row, mean + rest)
    tl.store(statistics_ptr + M + row, rstd)

    if ADD:
        tl.debug_barrier()  # h is read back below, perhaps by other threads than wrote it
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        if ADD:
            h = tl.load(h_ptr + m * N + n, live, other=0.0)
        else:
            h = tl.load(x_ptr + m * x_stride + n, live, other=0.0)
        y = ((h.to(tl.float32) - mean) - rest) * rstd
        if WEIGHT:
            y *= tl.load(w_ptr + n, live, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(b_ptr + n, live, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["M"])
def _backward_rows(
    dy_ptr, h_ptr, w_ptr, statistics_ptr, dh_ptr, dx_ptr, partial_ptr, dy_stride, h_stride,
    dh_stride, N, M, ADD: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P programs stride over tiles of whole rows; each keeps its shares of dw and db."""
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    if WEIGHT:
        scale = tl.load(w_ptr + n, n < N, other=0.0).to(tl.float32)  # [N]
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for tile in range(p, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (m < M)[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + m[:, None] * dy_stride + n[None, :], live, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + m[:, None] * h_stride + n[None, :], live, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + m, m < M, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + M + m, m < M, other=0.0)[:, None]
        xhat = tl.where(live, (h - mean) * rstd, 0.0)
        g = dy * scale[None, :] if WEIGHT else dy
        along = (tl.sum(g * xhat, 1) / N)[:, None]
        dx = rstd * (g - (tl.sum(g, 1) / N)[:, None] - xhat * along)
        if ADD:
            dh_at = dh_ptr + m[:, None] * dh_stride + n[None, :]
            dx += tl.load(dh_at, live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m[:, None] * N + n[None, :], dx.to(dx_ptr.dtype.element_ty), live)
        if SUMS:
            dw += dy * xhat
            db += dy

    if SUMS:
        at = partial_ptr + tl.cast(p, tl.int64) * 2 * N + n
        tl.store(at, tl.sum(dw, 0), n < N)
        tl.store(at + N, tl.sum(db, 0), n < N)


@triton.jit(do_not_specialize=["M"])
def _backward_dots(
    dy_ptr, h_ptr, w_ptr, statistics_ptr, dots_ptr, dy_stride, h_stride, N, M,
    WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean_n(g) and mean_n(g * xhat) of one row a program, for rows that take several tiles."""
    m = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(statistics_ptr + m), tl.load(statistics_ptr + M + m)
    whole = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        g = tl.load(dy_ptr + m * dy_stride + n, live, other=0.0).to(tl.float32)  # [N]
        h = tl.load(h_ptr + m * h_stride + n, live, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= tl.load(w_ptr + n, live, other=0.0).to(tl.float32)
        whole += g
        along += g * (h - mean)
    tl.store(dots_ptr + m, tl.sum(whole, 0) / N)
    tl.store(dots_ptr + M + m, tl.sum(along, 0) * rstd / N)


@triton.jit(do_not_specialize=["M"])
def _backward_columns(
    dy_ptr, h_ptr, w_ptr, statistics_ptr, dh_ptr, dx_ptr, partial_ptr, dots_ptr, dy_stride,
    h_stride, dh_stride, N, M, ADD: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and shares of dw and db for BLOCK_N columns; programs of axis 1 stride over the rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    live = n < N
    if WEIGHT:
        scale = tl.load(w_ptr + n, live, other=0.0).to(tl.float32)  # [N]
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(p, M, tl.num_programs(1)):
        m = tl.cast(row, tl.int64)
        dy = tl.load(dy_ptr + m * dy_stride + n, live, other=0.0).to(tl.float32)  # [N]
        h = tl.load(h_ptr + m * h_stride + n, live, other=0.0).to(tl.float32)
        rstd = tl.load(statistics_ptr + M + m)
        xhat = (h - tl.load(statistics_ptr + m)) * rstd
        g = dy * scale if WEIGHT else dy
        dx = rstd * (g - tl.load(dots_ptr + m) - xhat * tl.load(dots_ptr + M + m))
        if ADD:
            dx += tl.load(dh_ptr + m * dh_stride + n, live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), live)
        if SUMS:
            dw += dy * xhat
            db += dy

    if SUMS:
        at = partial_ptr + tl.cast(p, tl.int64) * 2 * N + n
        tl.store(at, dw, live)
        tl.store(at + N, db, live)


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
    "layer_norm",
    "forward",
    forward_blocks,
    lambda N: around(forward_blocks(N), taller=N <= ROW_LIMIT_FORWARD),
)
BACKWARD = Tunable(
    "layer_norm",
    "backward",
    backward_blocks,
    lambda N: around(backward_blocks(N), taller=whole_rows_backward(N)),
)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y and the statistics of x."""
    y, statistics = empty_forward(x)
    _launch_forward(x, None, weight, bias, y, y, statistics, eps)
    return y, statistics


def forward_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and the statistics of h = x + residual."""
    y, h, statistics = empty_forward_add(x, residual)
    _launch_forward(x, residual, weight, bias, y, h, statistics, eps)
    return y, h, statistics


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor,
    statistics: Tensor,
    eps: float,
) -> None:
    M, N = statistics.shape[1], x.shape[-1]
    if M == 0:
        return
    x, x_stride = as_rows(x)
    r, r_stride = (x, x_stride) if residual is None else as_rows(residual)
    launcher = _forward_rows_at if N <= ROW_LIMIT_FORWARD else _forward_wide_at
    block_m, block_n, warps = FORWARD(N, x)
    # an absent tensor's place is taken by one that is never read
    w = statistics if weight is None else weight.contiguous()
    b = statistics if bias is None else bias.contiguous()
    with guard(x):
        launcher(
            (cdiv(M, block_m), 1, 1),
            (x, r, w, b, y, h, statistics),
            (x_stride, r_stride, N),
            (M, float(eps)),
            (residual is not None, weight is not None, bias is not None, block_m, block_n),
            warps,
        )


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
    d, d_stride = (dy, dy_stride) if dh is None else as_rows(dh)
    w = statistics if weight is None else weight.contiguous()
    tensors = (dy, h, w, statistics, d, dx)
    strides = (dy_stride, h_stride, d_stride, N)
    flags = (dh is not None, weight is not None, sums is not None)
    block_m, block_n, warps = BACKWARD(N, h)
    with guard(h):
        if whole_rows_backward(N):
            # as many programs as fit on the device at once, so that none starts late
            P = min(cdiv(M, block_m), multiprocessors(h.device) * max(1, 16 // warps))
            partial = _partial(P, N, statistics, sums)
            constants = (*flags, block_m, block_n)
            _backward_rows_at((P, 1, 1), (*tensors, partial), strides, (M,), constants, warps)
        else:
            partial = _backward_wide(tensors, strides, M, flags, sums)
        if sums is not None:
            sum_partials(partial, total)
    return dx, total


def _partial(P: int, N: int, statistics: Tensor, sums: torch.dtype | None) -> Tensor:
    if sums is None:
        return statistics
    return torch.empty(P, 2 * N, dtype=torch.float32, device=statistics.device)


def _backward_wide(
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
    M: int,
    flags: tuple[bool, bool, bool],
    sums: torch.dtype | None,
) -> Tensor:
    dy, h, w, statistics, _, _ = tensors
    dy_stride, h_stride, _, N = strides
    _, block_n, warps = BACKWARD(N, h)
    dots = torch.empty_like(statistics)
    _backward_dots_at(
        (M, 1, 1),
        (dy, h, w, statistics, dots),
        (dy_stride, h_stride, N),
        (M,),
        (flags[1], block_n),
        warps,
    )
    columns = cdiv(N, block_n)
    P = min(M, cdiv(4 * multiprocessors(h.device), columns))
    partial = _partial(P, N, statistics, sums)
    _backward_columns_at(
        (columns, P, 1), (*tensors, partial, dots), strides, (M,), (*flags, block_n), warps
    )
    return partial
