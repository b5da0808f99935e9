"""qk_norm_rotary in Triton: q and k are read once going forward, they and dy once going backward.

    rstd[r]  = 1 / sqrt(mean_n(x[r, n]^2) + eps)          one row r: one head of one token
    xhat     = x * rstd                                   h = xhat * (offset + w)
    y1, y2   = h1 * c1 - h2 * s1,  h2 * c2 + h1 * s2      for each of the R/2 pairs, y = h past R
    g1, g2   = dy1 * c1 + dy2 * s2,  dy2 * c2 - dy1 * s1  the rotation transposed, g = dy past R
    dx       = rstd * (g * (offset + w) - xhat * mean_n(g * (offset + w) * xhat))
    dw[n]    = sum_r(g[r, n] * xhat[r, n])

Shapes   M = B * S tokens, H query and Hk key heads, D features, P programs.
         q, y, dy, dx: (B, H, S, D), k alike with Hk, any strides; only features that are not
         adjacent are copied.  weights, dw: (D,).  partial: (P, D), with keys (P, 2 * D), fp32.
Rounding all arithmetic is fp32 and results are rounded once, except for casting "llama" (eager.py).
Traffic  at b bytes an element, forward 2*M*(H + Hk)*D*b, backward 3*M*(H + Hk)*D*b + 16*P*D; the
         tables once for each HEADS heads of a token, mostly from L2.  rstd is summed again in the
         backward, which holds the row anyway, rather than stored and read.
Order    a row's block sizes depend on D and R alone, so its y and dx are bitwise the same in any
         batch.  dw is summed in a fixed order that depends on the shape and the number of
         multiprocessors: bit-equal reruns on one kind of device, no atomics.
Source   Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Su et al. 2021, arXiv:2104.09864, eq. 34.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.device import guard, multiprocessors
from swathe.kernels.core.heads import (
    blocks,
    heads_each,
    load_angles,
    load_features,
    store_features,
    turned,
    unit,
)
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.partials import sum_partials
from swathe.kernels.core.rotation import angles
from swathe.kernels.core.rows import unit_rows
from swathe.kernels.qk_norm_rotary.op import empty_backward, empty_forward

STAGES = tl.constexpr(3)  # two heads are on their way from memory while one is worked on
WARPS_RESIDENT = 12  # of a backward on one multiprocessor, at some 150 registers a thread
_PLAIN = ["M", "S", "H", "Hk", "heads_each", "rows", "h_start", "w_start"]


@triton.jit
def _load_weight(
    w_ptr, offset, step, D, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """offset + w as rows [1, I], [1, I] and [1, T]."""
    at = w_ptr + tl.zeros((1,), tl.int32)
    live = tl.full((1,), 1, tl.int1)
    w1, w2, w3 = load_features(at, live, step, D, UNIT, INTERLEAVED, 1, BLOCK_I, BLOCK_T)
    return offset + w1, offset + w2, offset + w3


@triton.jit
def _rstd_of(x1, x2, tail, D, eps, BLOCK_T: tl.constexpr):
    """1 / sqrt(mean of squares) of each row."""
    squares = tl.sum(x1 * x1 + x2 * x2, 1)
    if BLOCK_T > 0:
        squares += tl.sum(tail * tail, 1)
    return 1.0 / tl.sqrt_rn(squares / D + eps)


@triton.jit
def _scaled(x, rstd, scale, like: tl.constexpr, ROUND_XHAT: tl.constexpr, ROUND_H: tl.constexpr):
    """Normalised and weighted features, rounded to the dtype of `like` where HF rounds them."""
    xhat = x * rstd[:, None]
    if ROUND_XHAT:
        xhat = xhat.to(like).to(tl.float32)
    h = xhat * scale
    if ROUND_H:
        h = h.to(like).to(tl.float32)
    return h


@triton.jit
def _where(condition, a_b, a_h, a_s, b_b, b_h, b_s):
    """The strides (batch, head, token) of a tensor or those of another."""
    return (
        tl.where(condition, a_b, b_b),
        tl.where(condition, a_h, b_h),
        tl.where(condition, a_s, b_s),
    )


@triton.jit(do_not_specialize=_PLAIN)
def _forward(
    q_ptr, k_ptr, qw_ptr, kw_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, yq_b, yq_h, yq_s, yk_b, yk_h, yk_s, axis_stride, b_stride,
    s_stride, row_stride, D, step, M, S, H, Hk, heads_each, rows, h_start, w_start, eps, offset,
    FORM: tl.constexpr, POSITIONS: tl.constexpr, MROPE: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROUND_XHAT: tl.constexpr,
    ROUND_H: tl.constexpr, ROUND_Y: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and up to heads_each heads, of q or of k, a program."""
    # torch.compile may pass a Python float as fp64, which would promote every line below
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    dtype: tl.constexpr = yq_ptr.dtype.element_ty
    q_groups = tl.cdiv(H, heads_each)
    groups = q_groups + tl.cdiv(Hk, heads_each)
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    of_k = group >= q_groups
    x_ptr, w_ptr = tl.where(of_k, k_ptr, q_ptr), tl.where(of_k, kw_ptr, qw_ptr)
    y_ptr, heads = tl.where(of_k, yk_ptr, yq_ptr), tl.where(of_k, Hk, H)
    x_b, x_h, x_s = _where(of_k, k_b, k_h, k_s, q_b, q_h, q_s)
    y_b, y_h, y_s = _where(of_k, yk_b, yk_h, yk_s, yq_b, yq_h, yq_s)
    first = tl.where(of_k, group - q_groups, group) * heads_each

    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, s, live = m // S, m % S, m < M
    c1, s1, c2, s2 = load_angles(
        cos_ptr, sin_ptr, positions_ptr, axis_stride, b_stride, s_stride, row_stride, rows, h_start,
        w_start, b, s, live, step * UNIT, FORM, POSITIONS, MROPE, BLOCK_M, BLOCK_I,
    )  # fmt: skip
    w1, w2, w3 = _load_weight(w_ptr, offset, step, D, UNIT, INTERLEAVED, BLOCK_I, BLOCK_T)
    x_at, y_at = x_ptr + b * x_b + s * x_s, y_ptr + b * y_b + s * y_s
    for head in tl.range(first, tl.minimum(first + heads_each, heads), num_stages=STAGES):
        n = tl.cast(head, tl.int64)
        x1, x2, x3 = load_features(
            x_at + n * x_h, live, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T
        )
        rstd = _rstd_of(x1, x2, x3, D, eps, BLOCK_T)
        h1 = _scaled(x1, rstd, w1, dtype, ROUND_XHAT, ROUND_H)
        h2 = _scaled(x2, rstd, w2, dtype, ROUND_XHAT, ROUND_H)
        h3 = _scaled(x3, rstd, w3, dtype, ROUND_XHAT, ROUND_H)
        y1, y2 = turned(h1, h2, c1, s1, c2, s2, dtype, ROUND_Y)
        store_features(
            y_at + n * y_h, live, y1, y2, h3, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T
        )


@triton.jit
def _normed(x1, x2, x3, h1, h2, h3, live, D, eps, BLOCK_T: tl.constexpr):
    """xhat, rstd and mean(h * xhat) of a head, with h = g * (offset + w)."""
    rstd = _rstd_of(x1, x2, x3, D, eps, BLOCK_T)
    dot = tl.sum(h1 * x1 + h2 * x2, 1)
    if BLOCK_T > 0:
        dot += tl.sum(h3 * x3, 1)
    mean = (dot * rstd / D)[:, None]
    # without eps, 1 / 0 of a token that is not there would reach dw as 0 * inf
    rstd = tl.where(live, rstd, 0.0)[:, None]
    return x1 * rstd, x2 * rstd, x3 * rstd, rstd, mean


@triton.jit
def _store_partials(
    row, of_k, with_k, dw1, dw2, dw3, D, step,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program's row of sums, (D,) of q then (D,) of k: its own, and zeros for the other."""
    none, rest = tl.zeros((1, BLOCK_I), tl.float32), tl.zeros((1, max(BLOCK_T, 1)), tl.float32)
    row, one = row + tl.zeros((1,), tl.int32), tl.full((1,), 1, tl.int1)
    store_features(
        row + tl.where(of_k, D, 0), one, dw1, dw2, dw3, step, D, UNIT, INTERLEAVED, 1, BLOCK_I,
        BLOCK_T,
    )  # fmt: skip
    store_features(
        row + tl.where(of_k, 0, D), one & with_k, none, none, rest, step, D, UNIT, INTERLEAVED, 1,
        BLOCK_I, BLOCK_T,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_PLAIN, "q_programs"])
def _backward(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, qw_ptr, kw_ptr, dq_ptr, dk_ptr, partial_ptr, cos_ptr, sin_ptr,
    positions_ptr, dyq_b, dyq_h, dyq_s, dyk_b, dyk_h, dyk_s, q_b, q_h, q_s, k_b, k_h, k_s,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, axis_stride, b_stride, s_stride, row_stride, D, step,
    M, S, H, Hk, heads_each, q_programs, rows, h_start, w_start, eps, offset,
    FORM: tl.constexpr, POSITIONS: tl.constexpr, MROPE: tl.constexpr, UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first q_programs stride over the tiles of q, the others over those of k."""
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    p = tl.program_id(0)
    of_k = p >= q_programs
    dy_ptr, dx_ptr = tl.where(of_k, dyk_ptr, dyq_ptr), tl.where(of_k, dk_ptr, dq_ptr)
    x_ptr, w_ptr = tl.where(of_k, k_ptr, q_ptr), tl.where(of_k, kw_ptr, qw_ptr)
    dy_b, dy_h, dy_s = _where(of_k, dyk_b, dyk_h, dyk_s, dyq_b, dyq_h, dyq_s)
    x_b, x_h, x_s = _where(of_k, k_b, k_h, k_s, q_b, q_h, q_s)
    dx_b, dx_h, dx_s = _where(of_k, dk_b, dk_h, dk_s, dq_b, dq_h, dq_s)
    heads, first = tl.where(of_k, Hk, H), tl.where(of_k, p - q_programs, p)
    stride = tl.where(of_k, tl.num_programs(0) - q_programs, q_programs)
    groups = tl.cdiv(heads, heads_each)
    w1, w2, w3 = _load_weight(w_ptr, offset, step, D, UNIT, INTERLEAVED, BLOCK_I, BLOCK_T)
    dw1, dw2 = tl.zeros((BLOCK_M, BLOCK_I), tl.float32), tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    dw3 = tl.zeros((BLOCK_M, BLOCK_T if BLOCK_T > 0 else 1), tl.float32)

    for work in range(first, tl.cdiv(M, BLOCK_M) * groups, stride):
        m = tl.cast(work // groups, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        b, s, live = m // S, m % S, m < M
        c1, s1, c2, s2 = load_angles(
            cos_ptr, sin_ptr, positions_ptr, axis_stride, b_stride, s_stride, row_stride, rows,
            h_start, w_start, b, s, live, step * UNIT, FORM, POSITIONS, MROPE, BLOCK_M, BLOCK_I,
        )  # fmt: skip
        dy_at, x_at = dy_ptr + b * dy_b + s * dy_s, x_ptr + b * x_b + s * x_s
        dx_at = dx_ptr + b * dx_b + s * dx_s
        start = work % groups * heads_each
        for head in tl.range(start, tl.minimum(start + heads_each, heads), num_stages=STAGES):
            n = tl.cast(head, tl.int64)
            dy1, dy2, g3 = load_features(
                dy_at + n * dy_h, live, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T
            )
            x1, x2, x3 = load_features(
                x_at + n * x_h, live, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T
            )
            g1, g2 = dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1
            x1, x2, x3, rstd, mean = _normed(
                x1, x2, x3, g1 * w1, g2 * w2, g3 * w3, live, D, eps, BLOCK_T
            )
            dw1 += g1 * x1
            dw2 += g2 * x2
            dw3 += g3 * x3
            g1, g2, g3 = g1 * w1, g2 * w2, g3 * w3
            store_features(
                dx_at + n * dx_h, live, rstd * (g1 - x1 * mean), rstd * (g2 - x2 * mean),
                rstd * (g3 - x3 * mean), step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T,
            )  # fmt: skip

    _store_partials(
        partial_ptr + tl.cast(p, tl.int64) * tl.where(Hk > 0, 2 * D, D), of_k, Hk > 0,
        tl.sum(dw1, 0)[None, :], tl.sum(dw2, 0)[None, :], tl.sum(dw3, 0)[None, :], D, step, UNIT,
        INTERLEAVED, BLOCK_I, BLOCK_T,
    )  # fmt: skip


_forward_at = Launcher(_forward)
_backward_at = Launcher(_backward)


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    norm_casting: str,
    casting: str,
    *rotation: Any,
) -> list[Tensor]:
    """q, and k where there is one, normalised and turned; `rotation` is core.rotation.angles'."""
    found = empty_forward(q, k)
    B, H, S, D = q.shape
    Hk = 0 if k is None else k.shape[1]
    if B * S * (H + Hk) == 0:
        return found
    q, k, q_weight, k_weight = _operands(q, k, q_weight, k_weight)
    *_, R, interleaved = rotation
    turning = angles(*rotation)
    tile, llama = blocks(D, R), casting == "llama"
    tiles = cdiv(B * S, tile.tokens)
    each = heads_each(tiles, H + Hk, q.device)
    rounds = (llama and norm_casting == "llama", llama, llama and rotation[0].dtype == q.dtype)
    with guard(q):
        _forward_at(
            (tiles * (cdiv(H, each) + cdiv(Hk, each)), 1, 1),
            (q, k, q_weight, k_weight, found[0], found[-1], *turning.tensors),
            (*_strides(q, k, found[0], found[-1]), *turning.strides, D, R // 2 // unit(R // 2)),
            (B * S, S, H, Hk, each, *turning.plain, float(eps), float(offset)),
            (*turning.flags, unit(R // 2), interleaved, *rounds, *tile[:3]),
            tile.warps,
        )
    return found


def backward(
    dyq: Tensor,
    dyk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    *rotation: Any,
) -> list[Tensor]:
    """The gradients of q, of k where there is one, and of the weights, end to end."""
    found = empty_backward(dyq, dyk, q, k, q_weight)
    B, H, S, D = q.shape
    Hk = 0 if k is None else k.shape[1]
    dw = found[-1]
    if B * S * (H + Hk) == 0:
        dw.zero_()
        return found
    dyk = dyq if dyk is None else dyk
    q, k, q_weight, k_weight = _operands(q, k, q_weight, k_weight)
    *_, R, interleaved = rotation
    turning = angles(*rotation)
    tile = blocks(D, R)
    P, of_q, each = programs(cdiv(B * S, tile.tokens), H, Hk, tile.warps, q.device)
    partial = torch.empty(P, dw.shape[0], dtype=torch.float32, device=q.device)
    operands = (dyq, dyk, q, k)
    dx = (found[0], found[-2])
    with guard(q):
        _backward_at(
            (P, 1, 1),
            (*operands, q_weight, k_weight, *dx, partial, *turning.tensors),
            (*_strides(*operands, *dx), *turning.strides, D, R // 2 // unit(R // 2)),
            (B * S, S, H, Hk, each, of_q, *turning.plain, float(eps), float(offset)),
            (*turning.flags, unit(R // 2), interleaved, *tile[:3]),
            tile.warps,
        )
        sum_partials(partial, dw)
    return found


def _operands(
    q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With adjacent features; where there is no k, kernels are given q and do not touch it."""
    q, q_weight = unit_rows(q), q_weight.contiguous()
    if k is None or k_weight is None:
        return q, q, q_weight, q_weight
    return q, unit_rows(k), q_weight, k_weight.contiguous()


def programs(tiles: int, H: int, Hk: int, warps: int, device: torch.device) -> tuple[int, int, int]:
    """Programs of a backward, how many of them serve q, and heads for each tile of tokens."""
    each = heads_each(tiles, H + Hk, device)
    of_q, of_k = tiles * cdiv(H, each), tiles * cdiv(Hk, each)
    # as many as fit on the device at once, so that none starts late
    P = min(of_q + of_k, multiprocessors(device) * max(1, WARPS_RESIDENT // warps))
    return P, P - min(of_k, max(1, P * Hk // (H + Hk))), each


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple([stride for t in tensors for stride in t.stride()[:3]])
