"""Heads as rows of a tile: (B, H, S, D) tensors of any strides, read as pairs and a tail.

A row is one head of one token. Its first 2 * half features are pairs, halves (x[i], x[i + half]) or
interleaved neighbours (x[2i], x[2i + 1]); what is past them is the tail. The angles that a pair is
turned by come from the tables of core/rotation.py.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from swathe.kernels.core.device import multiprocessors
from swathe.kernels.core.launch import next_power_of_2
from swathe.kernels.core.rotation import COMPACT, HALVES

_HALVES, _COMPACT = tl.constexpr(HALVES), tl.constexpr(COMPACT)
ELEMENTS_A_THREAD = 16  # 16 bytes of bf16 from either half; twice as many spill going backward
TILE = 2048
TOKENS = 32  # the most a tile holds, where heads are narrow
HEADS = 8  # the most one program turns by the angles it has loaded
PROGRAMS = 12  # for each multiprocessor, before heads are grouped
LANES = 64 if torch.version.hip else 32


class Blocks(NamedTuple):
    """Tokens, pairs and features past the pairs of a tile, and the warps that work on it."""

    tokens: int
    pairs: int
    rest: int
    warps: int


@lru_cache
def blocks(D: int, R: int) -> Blocks:
    """Tile for heads of D features, R of them in pairs; the number of tokens has no say in it."""
    pairs = next_power_of_2(R // 2)
    rest = next_power_of_2(D - R) if D > R else 0
    columns = next_power_of_2(2 * pairs + rest)
    tokens = min(TOKENS, max(1, TILE // columns))
    return Blocks(tokens, pairs, rest, max(1, tokens * columns // (LANES * ELEMENTS_A_THREAD)))


@lru_cache
def unit(half: int) -> int:
    """The largest power of two, up to 16, that divides half the paired features.

    Triton knows only whether an integer is divisible by 16; the 40 of a head of 80 features
    would be read two bytes at a time.
    """
    return next(u for u in (16, 8, 4, 2, 1) if half % u == 0)


def heads_each(tiles: int, heads: int, device: torch.device) -> int:
    """Heads that one program turns by the angles it has loaded: more where work is plenty."""
    return min(HEADS, max(1, int(tiles * heads / (PROGRAMS * multiprocessors(device)))))


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, positions_ptr, axis_stride, b_stride, s_stride, row_stride, rows, h_start,
    w_start, b, s, live, half, FORM: tl.constexpr, POSITIONS: tl.constexpr, MROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """c1, s1, c2, s2 [M, I] in fp32 for tokens (b, s) [M] (int64) and the first `half` pairs."""
    i = tl.arange(0, BLOCK_I)
    at = (b * b_stride + s * s_stride)[:, None]  # [M, 1]
    inside = live[:, None] & (i < half)[None, :]  # [M, I]
    if MROPE:
        axis = (i >= h_start).to(tl.int64) + (i >= w_start).to(tl.int64)
        at += (axis * axis_stride)[None, :]
    known = inside
    if POSITIONS:
        row = tl.load(positions_ptr + at, inside if MROPE else live[:, None], other=0).to(tl.int64)
        known = inside & (row >= 0) & (row < rows)
        at = row * row_stride
    # an entry that is not there is NaN; lanes past the pairs are never stored
    nothing = float("nan")
    if FORM == _HALVES:
        at += i[None, :]
        c1 = tl.load(cos_ptr + at, known, other=nothing).to(tl.float32)
        s1 = tl.load(sin_ptr + at, known, other=nothing).to(tl.float32)
        c2 = tl.load(cos_ptr + at + half, known, other=nothing).to(tl.float32)
        s2 = tl.load(sin_ptr + at + half, known, other=nothing).to(tl.float32)
    elif FORM == _COMPACT:
        at += i[None, :]
        c1 = tl.load(cos_ptr + at, known, other=nothing).to(tl.float32)
        s1 = tl.load(sin_ptr + at, known, other=nothing).to(tl.float32)
        c2, s2 = c1, s1
    else:
        at += 2 * i[None, :]
        c1 = tl.load(cos_ptr + at, known, other=nothing).to(tl.float32)
        s1 = tl.load(sin_ptr + at, known, other=nothing).to(tl.float32)
        c2 = tl.load(cos_ptr + at + 1, known, other=nothing).to(tl.float32)
        s2 = tl.load(sin_ptr + at + 1, known, other=nothing).to(tl.float32)
    # dead lanes are zero, so that reductions over a row may include them
    c1, s1 = tl.where(inside, c1, 0.0), tl.where(inside, s1, 0.0)
    return c1, s1, tl.where(inside, c2, 0.0), tl.where(inside, s2, 0.0)


@triton.jit
def load_features(
    at, live, step, D, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Rows at `at` [M] in fp32: both members of each pair [M, I], and the tail [M, T]."""
    half = step * UNIT
    if INTERLEAVED:
        n = tl.arange(0, 2 * BLOCK_I)
        both = tl.load(at[:, None] + n[None, :], live[:, None] & (n < 2 * half)[None, :], other=0.0)
        x1, x2 = tl.split(tl.reshape(both.to(tl.float32), (BLOCK_M, BLOCK_I, 2)))
    else:
        i = tl.arange(0, BLOCK_I)
        inside = live[:, None] & (i < half)[None, :]
        x1 = tl.load(at[:, None] + i[None, :], inside, other=0.0).to(tl.float32)
        x2 = tl.load(at[:, None] + half + i[None, :], inside, other=0.0).to(tl.float32)
    if BLOCK_T > 0:
        n = 2 * half + tl.arange(0, BLOCK_T)
        tail = tl.load(at[:, None] + n[None, :], live[:, None] & (n < D)[None, :], other=0.0)
        tail = tail.to(tl.float32)
    else:
        tail = tl.zeros((BLOCK_M, 1), tl.float32)
    return x1, x2, tail


@triton.jit
def store_features(
    at, live, x1, x2, tail, step, D, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The reverse of load_features, rounded to the dtype that `at` points to."""
    half = step * UNIT
    dtype = at.dtype.element_ty
    if INTERLEAVED:
        n = tl.arange(0, 2 * BLOCK_I)
        both = tl.reshape(tl.join(x1.to(dtype), x2.to(dtype)), (BLOCK_M, 2 * BLOCK_I))
        tl.store(at[:, None] + n[None, :], both, live[:, None] & (n < 2 * half)[None, :])
    else:
        i = tl.arange(0, BLOCK_I)
        inside = live[:, None] & (i < half)[None, :]
        tl.store(at[:, None] + i[None, :], x1.to(dtype), inside)
        tl.store(at[:, None] + half + i[None, :], x2.to(dtype), inside)
    if BLOCK_T > 0:
        n = 2 * half + tl.arange(0, BLOCK_T)
        tl.store(at[:, None] + n[None, :], tail.to(dtype), live[:, None] & (n < D)[None, :])


@triton.jit
def turned(x1, x2, c1, s1, c2, s2, like: tl.constexpr, ROUND: tl.constexpr):
    """Every pair turned by its angle; with ROUND each product is rounded to `like`, as HF does."""
    if ROUND:
        y1 = (x1 * c1).to(like).to(tl.float32) - (x2 * s1).to(like).to(tl.float32)
        y2 = (x2 * c2).to(like).to(tl.float32) + (x1 * s2).to(like).to(tl.float32)
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    return y1, y2
