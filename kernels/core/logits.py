"""Cross-entropy of rows of logits in Triton: one read for the losses, one more for the gradients.

    z[m, v]    = scale * x[m, v]          with a softcap c: z = c * tanh(scale * x / c)
    peak[m]    = max_v z[m, v]            log_sum[m] = log(sum_v exp(z[m, v] - peak[m]))
    lse[m]     = peak[m] + log_sum[m]
    loss[m]    = lse - (1 - s) * z[m, label[m]] - s * mean_v(z[m, v]) + z_loss * lse^2
    p[m, v]    = exp(z[m, v] - lse[m])
    dz[m, v]   = p * (1 + 2 * z_loss * lse) - s / V - (1 - s) * [v = label[m]]
    dx[m, v]   = arriving[m] * scale * dz * (1 - (z / c)^2)

Shapes   M rows, V classes.  x: (M, V) with one row stride.  labels: (M,) of any integer type.
         loss, peak, log_sum, rest: (M,) fp32.  arriving: fp32, () or (M,).  dx: (M, V) contiguous.
Labels   a row whose label is ignore_index is not read: its loss is 0 and so are its gradients.  Any
         other label outside [0, V) reads nothing out of bounds; loss and gradients become NaN.
Rounding all arithmetic is fp32, dx is rounded once.  lse is kept as peak and log_sum, because their
         sum loses the digits of log_sum when logits are large.  rest[m] is what the rounding of
         dx[m, label[m]] lost: that one element is as large as all others of its row together.
Traffic  at b bytes an element: losses M*V*b, gradients 2*M*V*b; ignored rows 0 and M*V*b.
Order    a row's block size depends on V alone, its programs on nothing else: bit-equal in any
         batch, no atomics.
Source   Milakov & Gimelshein 2018, arXiv:1805.02867, each lane of a tile keeping a sum of its own;
         z_loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.device import guard
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.losses import empty_losses, one_stride
from swathe.kernels.core.rows import as_rows
from swathe.kernels.core.tl_math import tanh

# columns a tile and warps: 16 elements a thread, two 16-byte loads of bf16 in flight
NARROW, WIDE = (1024, 2), (4096, 8)

_LOWEST = tl.constexpr(-3.0e38)  # finite, so that -inf minus it is -inf and not NaN


@triton.jit
def _scores(x, scale, softcap, SOFTCAP: tl.constexpr):
    """z of raw logits, and tanh where there is a softcap (z again where there is none)."""
    z = x.to(tl.float32) * scale
    if SOFTCAP:
        t = tanh(z / softcap)
        return softcap * t, t
    else:
        return z, z


@triton.jit(do_not_specialize=["ignore_index"])
def _losses(
    x_ptr, label_ptr, loss_ptr, peak_ptr, log_sum_ptr, x_stride, V, ignore_index, smoothing,
    softcap, scale, z_loss, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_V columns at a time."""
    # torch.compile may pass a Python float as fp64, which would promote every line below
    smoothing, softcap = tl.cast(smoothing, tl.float32), tl.cast(softcap, tl.float32)
    scale, z_loss = tl.cast(scale, tl.float32), tl.cast(z_loss, tl.float32)
    m = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + m * x_stride
    label = tl.load(label_ptr + m).to(tl.int64)
    ignored = label == ignore_index
    known = (label >= 0) & (label < V)
    end = tl.where(ignored, 0, V)

    peak = tl.full((BLOCK_V,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        live = v < V
        z, _ = _scores(tl.load(row_ptr + v, live, other=0.0), scale, softcap, SOFTCAP)  # [V]
        if SMOOTH:
            total += tl.where(live, z, 0.0)
        z = tl.where(live, z, float("-inf"))
        ahead = z - peak
        # one exponential an element: it shrinks the old sum or is the new term
        step = tl.exp(-tl.abs(ahead))
        sums = tl.where(ahead > 0, sums * step + 1.0, sums + step)
        peak = tl.maximum(peak, z)

    top = tl.max(peak, 0)
    log_sum = tl.log(tl.sum(sums * tl.exp(peak - top), 0))
    at_label = tl.load(row_ptr + tl.where(known, label, 0), known, other=0.0)
    target, _ = _scores(at_label, scale, softcap, SOFTCAP)
    loss = (1.0 - smoothing) * (log_sum - (target - top))
    if SMOOTH:
        loss += smoothing * (log_sum - (tl.sum(total, 0) / V - top))
    lse = top + log_sum
    loss += z_loss * lse * lse
    loss = tl.where(ignored, 0.0, tl.where(known, loss, float("nan")))
    tl.store(loss_ptr + m, loss)
    tl.store(peak_ptr + m, top)
    tl.store(log_sum_ptr + m, log_sum)


@triton.jit(do_not_specialize=["ignore_index"])
def _gradients(
    x_ptr, label_ptr, peak_ptr, log_sum_ptr, arriving_ptr, dx_ptr, rest_ptr, x_stride,
    arriving_stride, V, ignore_index, smoothing, softcap, scale, z_loss, SOFTCAP: tl.constexpr,
    REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of one row a program."""
    smoothing, softcap = tl.cast(smoothing, tl.float32), tl.cast(softcap, tl.float32)
    scale, z_loss = tl.cast(scale, tl.float32), tl.cast(z_loss, tl.float32)
    tiles = tl.cdiv(V, BLOCK_V)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    label = tl.load(label_ptr + m).to(tl.int64)
    known = (label >= 0) & (label < V)
    live = v < tl.where(label == ignore_index, 0, V)

    x = tl.load(x_ptr + m * x_stride + v, live, other=0.0)  # [V]
    z, t = _scores(x, scale, softcap, SOFTCAP)
    peak, log_sum = tl.load(peak_ptr + m), tl.load(log_sum_ptr + m)
    arriving = tl.load(arriving_ptr + m * arriving_stride)
    arriving = tl.where(known, arriving * scale, float("nan"))
    dz = tl.exp((z - peak) - log_sum) * (1.0 + 2.0 * z_loss * (peak + log_sum)) - smoothing / V
    dz = tl.where(v == label, dz - (1.0 - smoothing), dz)
    if SOFTCAP:
        dz *= 1.0 - t * t
    dx = tl.where(live, dz * arriving, 0.0)
    rounded = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + m * V + v, rounded, v < V)
    if REST:
        # the tile with the label speaks for the row; the first where there is none
        speaker = tl.where(known, label // BLOCK_V, 0)
        if tile == speaker:
            lost = tl.where(v == label, dx - rounded.to(tl.float32), 0.0)
            tl.store(rest_ptr + m, tl.sum(lost, 0))


_losses_at = Launcher(_losses)
_gradients_at = Launcher(_gradients)


def block(V: int) -> tuple[int, int]:
    """Columns of a tile and its warps, for rows of V classes; the number of rows has no say."""
    return NARROW if NARROW[0] >= V else WIDE


def forward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, peak and log_sum of every row of `logits` (..., V); softcap 0 is none."""
    found = empty_losses(logits, labels)
    write_losses(logits, labels, (ignore_index, smoothing, softcap, scale, z_loss), *found)
    return found


def write_losses(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float, float, float],
    losses: Tensor,
    peak: Tensor,
    log_sum: Tensor,
) -> None:
    """Fill loss, peak and log_sum of the rows of `logits` (..., V); all three contiguous."""
    V, M = logits.shape[-1], labels.numel()
    if M == 0:
        return
    ignore_index, smoothing, softcap, scale, z_loss = options
    x, x_stride = as_rows(logits)
    columns, warps = block(V)
    with guard(x):
        _losses_at(
            (M, 1, 1),
            (x, labels.contiguous(), losses, peak, log_sum),
            (x_stride, V),
            (ignore_index, float(smoothing), float(softcap) or 1.0, float(scale), float(z_loss)),
            (softcap != 0, smoothing != 0, columns),
            warps,
        )


def backward(
    arriving: Tensor,
    logits: Tensor,
    labels: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> Tensor:
    """dlogits, in the shape and dtype of `logits`; `arriving` is () or one for each row."""
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = (ignore_index, smoothing, softcap, scale, z_loss)
    write_gradients(arriving, logits, labels, (peak, log_sum), options, dx)
    return dx


def write_gradients(
    arriving: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: tuple[Tensor, Tensor],
    options: tuple[int, float, float, float, float],
    dx: Tensor,
    rest: Tensor | None = None,
) -> None:
    """Fill `dx` (..., V), contiguous, which may be `logits` itself, and `rest` (M,) if given."""
    V, M = logits.shape[-1], labels.numel()
    if M == 0:
        return
    ignore_index, smoothing, softcap, scale, z_loss = options
    x, x_stride = as_rows(logits)
    columns, warps = block(V)
    arriving, stride = one_stride(arriving)
    peak, log_sum = statistics
    with guard(x):
        _gradients_at(
            (M * cdiv(V, columns), 1, 1),
            (x, labels.contiguous(), peak, log_sum, arriving, dx, peak if rest is None else rest),
            (x_stride, stride, V),
            (ignore_index, float(smoothing), float(softcap) or 1.0, float(scale), float(z_loss)),
            (softcap != 0, rest is not None, columns),
            warps,
        )
