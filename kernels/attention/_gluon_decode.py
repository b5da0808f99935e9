"""Launches the Gluon kernel for few queries over a long cache, and `fold` after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention._gluon_decode_split import attend
from swathe.kernels.attention._triton_blocks import fits_tma
from swathe.kernels.attention._triton_decode import fold, fold_warps, width
from swathe.kernels.attention.op import strides_of
from swathe.kernels.core.device import guard, multiprocessors
from swathe.kernels.core.gluon import TensorDescriptor, gl
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import unit_rows

__all__ = ["BLOCKS", "Blocks", "decode", "why_not"]

ROWS = 64  # of a warpgroup's product
FEWEST = 512  # keys of a split: its sums cost as much as 8 keys a row
PROGRAMS = 4  # a multiprocessor, which holds one or two at once

_attend_at = Launcher(attend)
_fold_at = Launcher(fold)


class Blocks(NamedTuple):
    """Keys of a tile, tiles under way, and registers of a thread of the copying warp."""

    keys: int
    stages: int
    least: int


# by the widest head, in elements: some 128 KB under way
BLOCKS = {64: Blocks(128, 4, 24), 128: Blocks(64, 4, 24), 256: Blocks(32, 4, 24)}


def blocks(D: int, E: int) -> Blocks:
    """Those of heads of D and E features."""
    return next(row for wide, row in BLOCKS.items() if max(D, E) <= wide)


def most_splits(rows: int, K: int) -> int:
    """Splits of a sequence at most, a power of two: some 512 programs' worth of rows."""
    return 1 << (max(4, min(64, 512 * 16 // (K * cdiv(rows, ROWS) * ROWS))).bit_length() - 1)


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    block_table: Tensor | None,
) -> str | None:
    """What of a call `decode` does not serve, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} q, k and v (allowed: bfloat16, float16)"
    if not (keys is None and allowed is None and bias is None):
        return "a mask of single keys or a bias (allowed: row intervals)"
    D, E = q.shape[3], v.shape[3]
    if max(D, E) > 256:
        return f"heads of {D} and {E} features (allowed: up to 256)"
    if width(D) != D or width(E) != E or min(D, E) < 64:
        return f"heads of {D} and {E} features (allowed: 64, 128, 256)"
    block = blocks(D, E).keys
    if block_table is not None and k.shape[2] % block:
        return f"pages of {k.shape[2]} keys (allowed: multiples of {block})"
    if not (fits_tma(k) and fits_tma(v)):
        return (
            f"k or v of strides {tuple(k.stride())} and {tuple(v.stride())} that the tensor-memory "
            "accelerator cannot take (allowed: features adjacent, the rest multiples of 16 bytes)"
        )
    return None


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    places: Tensor | None,
    keys: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32, of calls for which `why_not` says nothing."""
    (B, H, T, D), (_, K, page, E) = q.shape, v.shape
    S = page
    if block_table is not None:
        S, block_table = page * block_table.shape[1], unit_rows(block_table)
    o = q.new_empty(B, T, H, E)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if not B * H * T * E:
        return o, lse
    block, rows = blocks(D, E), T * H // K
    most = most_splits(rows, K)
    splits = max(1, min(most, cdiv(S, FEWEST)))
    parts = sums = None
    if splits > 1:
        parts = q.new_empty(B, H, T, splits, E, dtype=torch.float32)
        sums = q.new_empty(B, H, T, splits, 2, dtype=torch.float32)
    units = cdiv(rows, ROWS) * K * B
    slots = cdiv(splits, max(1, units * splits // (PROGRAMS * multiprocessors(q.device))))
    q = unit_rows(q)
    per_head = H if alibi is not None and alibi.dim() == 2 else 0
    of_table = 0 if block_table is None else block_table.stride(0)
    bounds = strides_of(first)
    with guard(q):
        _attend_at(
            (units * slots, 1, 1),
            (q, _tiles(k, block.keys), None, _tiles(v, block.keys), None, o, lse, parts, sums,
             first, last, places, block_table, sinks, alibi),
            (*q.stride()[:3], D, E),
            (*bounds, strides_of(places)[0], of_table, per_head, T, S, B, K, H // K, splits, slots,
             S - T, page, float(scale), float(softcap)),
            (softcap != 0.0 or alibi is not None or scale <= 0.0, softcap != 0.0, FEWEST, most,
             block.keys, block.stages, block.least),
            4,
            maxnreg=None,
        )  # fmt: skip
        if splits > 1:
            _fold_at(
                (B * H * T, 1, 1),
                (parts, sums, o, lse, first, last, sinks),
                (E,),
                (*bounds, T, S, H, H // K, splits),
                (FEWEST, most, ROWS, block.keys, width(E)),
                fold_warps(E),
            )
    return o, lse


def _tiles(t: Tensor, rows: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    box = [1, 1, rows, t.shape[3]]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), box, layout)
