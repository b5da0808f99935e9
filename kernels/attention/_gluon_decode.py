"""Launches the Gluon kernels for few queries over a long cache, and `fold` after them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention._gluon import box_of, descriptors, why_no_copies
from swathe.kernels.attention._gluon_blocks import COMPUTE, COPY, REGISTERS, boxes
from swathe.kernels.attention._gluon_decode_split import attend
from swathe.kernels.attention._gluon_latent import attend_latent
from swathe.kernels.attention._triton_blocks import generation
from swathe.kernels.attention._triton_decode import fold, fold_warps, width
from swathe.kernels.attention.op import strides_of
from swathe.kernels.core.device import guard, multiprocessors
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import unit_rows

__all__ = ["BLOCKS", "Blocks", "decode", "why_not"]

ROWS = 64  # of a warpgroup's product
FEWEST = 512  # keys of a split: its sums cost as much as 8 keys a row
PROGRAMS = 4  # a multiprocessor, which holds one at once
LATENT = (576, 512)  # features of DeepSeek's latent keys, and of the values that lie in them

_attend_at, _attend_latent_at = Launcher(attend), Launcher(attend_latent)
_fold_at = Launcher(fold)


class Blocks(NamedTuple):
    """Keys of a tile, and tiles of keys and of values under way."""

    keys: int
    stages: int


# by the widest head, in elements: some 128 KB under way
BLOCKS = {64: Blocks(128, 4), 128: Blocks(64, 4), 256: Blocks(32, 4)}
LATENT_BLOCKS = Blocks(64, 2)


def blocks(D: int, E: int) -> Blocks:
    """Those of heads of D and E features."""
    if (D, E) == LATENT:
        return LATENT_BLOCKS
    wide = max(sum(boxes(D)), sum(boxes(E)))
    return next(row for most, row in BLOCKS.items() if wide <= most)


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
    alibi: Tensor | None,
    block_table: Tensor | None,
) -> str | None:
    """Why `decode` cannot serve a call, or None: what was given, and what is allowed."""
    if not (keys is None and allowed is None and bias is None):
        return "a mask or bias has a number for every pair of row and key; allowed: row intervals"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {q.dtype}; allowed: torch.bfloat16 and torch.float16"
    if (made := generation(q.device)) != "hopper":
        return f"the GPU is of the generation {made!r}; allowed: 'hopper'"
    heads = k.shape[3], v.shape[3]
    reason = why_no_copies("k", k, widest=max(LATENT) if heads == LATENT else None)
    if heads == LATENT:
        if v.data_ptr() != k.data_ptr() or v.stride() != k.stride():
            return "heads of 576 and 512 features need v to be k[..., :512], in k's own memory"
        reason = reason or ("alibi is not for latent caches" if alibi is not None else None)
    reason = reason or (why_no_copies("v", v) if heads != LATENT else None)
    if reason is None and block_table is not None and k.shape[2] % blocks(*heads).keys:
        reason = f"pages of {k.shape[2]} keys; allowed: multiples of {blocks(*heads).keys}"
    return reason


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
    outputs = (o, lse, parts, sums, first, last, places, block_table, sinks)
    with guard(q):
        _attend(unit_rows(q), k, v, outputs, alibi, S, splits, most, block, scale, softcap)
        if splits > 1:
            _fold_at(
                (B * H * T, 1, 1),
                (parts, sums, o, lse, first, last, sinks),
                (E,),
                (*strides_of(first), T, S, H, H // K, splits),
                (FEWEST, most, ROWS, block.keys, width(E)),
                fold_warps(E),
            )
    return o, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: tuple[Tensor | None, ...],
    alibi: Tensor | None,
    S: int,
    splits: int,
    most: int,
    block: Blocks,
    scale: float,
    softcap: float,
) -> None:
    """Launch the kernel for heads of these sizes, for S keys in as many splits at most."""
    (B, H, T, D), (_, K, page, E) = q.shape, v.shape
    units = cdiv(T * H // K, ROWS) * K * B
    slots = cdiv(splits, max(1, units * splits // (PROGRAMS * multiprocessors(q.device))))
    first, places, table = outputs[4], outputs[6], outputs[7]
    bounds = (*strides_of(first), strides_of(places)[0], 0 if table is None else table.stride(0))
    sizes = (T, S, B, K, H // K, splits, slots, S - T, page, float(scale), float(softcap))
    scored = softcap != 0.0 or alibi is not None or scale <= 0.0
    flags = (scored, softcap != 0.0, FEWEST, most, block.keys)
    strides, grid = (*q.stride()[:3], D, E), (units * slots, 1, 1)
    if (D, E) == LATENT:
        tiles: tuple[Any, ...] = tuple(box_of(k, block.keys, width) for width in (512, 64))
        constants: tuple[Any, ...] = (*flags, COMPUTE, COPY)
        _attend_latent_at(
            grid, (q, *tiles, *outputs), strides, (*bounds, *sizes), constants, 4,
            maxnreg=REGISTERS,
        )  # fmt: skip
        return
    tiles = (*descriptors(k, block.keys), *descriptors(v, block.keys))
    per_head = H if alibi is not None and alibi.dim() == 2 else 0
    plain, constants = (*bounds, per_head, *sizes), (*flags, block.stages, COPY)
    _attend_at(grid, (q, *tiles, *outputs, alibi), strides, plain, constants, 4)
