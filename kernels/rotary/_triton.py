"""Rotary position embedding in Triton: q and k in one launch, each element read and written once.

    y1, y2 = x1 * c1 - x2 * s1,  x2 * c2 + x1 * s2        for each of the R/2 pairs, y = x past R
    dx1, dx2 = dy1 * c1 + dy2 * s2,  dy2 * c2 - dy1 * s1  the same with s1, s2 exchanged and turned

Shapes   M = B * S tokens, H query and Hk key heads, D features.  q, k, y and their gradients:
         (B, H, S, D) with any strides, features adjacent; results lie in memory as their inputs do.
Rounding all arithmetic is fp32 and rounded once; casting "llama" rounds each product (eager.py).
Traffic  at b bytes an element 2*M*(H + Hk)*D*b, forward and backward alike; the tables once for
         each HEADS heads of a token, mostly from L2.
Order    elementwise: nothing depends on anything but an element's own pair and angle.
Source   Su et al. 2021, arXiv:2104.09864, eq. 34.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.device import guard
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
from swathe.kernels.core.rotation import Angles
from swathe.kernels.core.rows import unit_rows
from swathe.kernels.rotary.op import empty, launchers


@triton.jit(do_not_specialize=["M", "S", "H", "Hk", "heads_each", "rows", "h_start", "w_start"])
def _rotate(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, yq_b, yq_h, yq_s, yk_b, yk_h, yk_s,
    axis_stride, table_b, table_s, row_stride, D, step, M, S, H, Hk, heads_each, rows, h_start,
    w_start, FORM: tl.constexpr, POSITIONS: tl.constexpr, MROPE: tl.constexpr, UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROUND: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and up to heads_each heads, of q or of k, a program."""
    q_groups = tl.cdiv(H, heads_each)
    groups = q_groups + tl.cdiv(Hk, heads_each)
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    of_k = group >= q_groups
    x_ptr, y_ptr = tl.where(of_k, k_ptr, q_ptr), tl.where(of_k, yk_ptr, yq_ptr)
    x_b, x_h, x_s = tl.where(of_k, k_b, q_b), tl.where(of_k, k_h, q_h), tl.where(of_k, k_s, q_s)
    y_b, y_h = tl.where(of_k, yk_b, yq_b), tl.where(of_k, yk_h, yq_h)
    y_s, heads = tl.where(of_k, yk_s, yq_s), tl.where(of_k, Hk, H)
    first = tl.where(of_k, group - q_groups, group) * heads_each

    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, s, live = m // S, m % S, m < M
    c1, s1, c2, s2 = load_angles(
        cos_ptr, sin_ptr, positions_ptr, axis_stride, table_b, table_s, row_stride, rows, h_start,
        w_start, b, s, live, step * UNIT, FORM, POSITIONS, MROPE, BLOCK_M, BLOCK_I,
    )  # fmt: skip
    if BACK:
        s1, s2 = -s2, -s1
    x_at, y_at = x_ptr + b * x_b + s * x_s, y_ptr + b * y_b + s * y_s
    for head in range(first, tl.minimum(first + heads_each, heads)):
        n = tl.cast(head, tl.int64)
        x1, x2, tail = load_features(
            x_at + n * x_h, live, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I, BLOCK_T
        )
        y1, y2 = turned(x1, x2, c1, s1, c2, s2, y_ptr.dtype.element_ty, ROUND)
        store_features(
            y_at + n * y_h, live, y1, y2, tail, step, D, UNIT, INTERLEAVED, BLOCK_M, BLOCK_I,
            BLOCK_T,
        )  # fmt: skip


_rotate_at = Launcher(_rotate)


def _run(
    q: Tensor,
    k: Tensor | None,
    turning: Angles,
    pairs: Sequence[Any],
    rounded: bool,
    back: bool,
) -> list[Tensor]:
    found, (rotary_dim, interleaved) = empty(q, k), pairs
    B, H, S, D = q.shape
    Hk = 0 if k is None else k.shape[1]
    if B * S * (H + Hk) == 0:
        return found
    q = unit_rows(q)
    k = q if k is None else unit_rows(k)
    yq, yk = found[0], found[-1]
    tables, strides, sizes, flags = turning
    *tile, warps = blocks(D, rotary_dim)
    tiles = cdiv(B * S, tile[0])
    each = heads_each(tiles, H + Hk, q.device)
    half = rotary_dim // 2
    places = (*q.stride()[:3], *k.stride()[:3], *yq.stride()[:3], *yk.stride()[:3])
    with guard(q):
        _rotate_at(
            (tiles * (cdiv(H, each) + cdiv(Hk, each)), 1, 1),
            (q, k, yq, yk, *tables),
            (*places, *strides, D, half // unit(half)),
            (B * S, S, H, Hk, each, *sizes),
            (*flags, unit(half), interleaved, rounded, back, *tile),
            warps,
        )
    return found


forward, backward = launchers(_run)
