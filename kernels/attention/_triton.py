"""Attention in Triton, forward and backward, on every GPU that Triton reaches.

    z[t, s] = the scores of spec.py, times log2(e)      p = exp2(z - lse2)     o = p v / sum(p)
    delta[t] = sum_d do[t, d] * o[t, d] - dlse[t]       dz = p * (do v^T - delta)
    ds = dz * z'       dq = scale * ds k     dk = scale * ds^T q     dv = p^T do     dbias = dz

Shapes   q, do, dq: (B, H, T, D).  k, dk: (B, K, S, D).  v, dv: (B, K, S, E).  o: (B, T, H, E).
         lse2 = lse / log(2): (B, H, T) fp32.  Features adjacent, other strides free: no copies.
Masks    first, last: (1 or B, 1 or T) int32, the interval of keys that a row sees (mask.bounds).
         Key tiles that no row of a tile sees are not visited, those that all rows see whole are
         not masked. Boolean keys, dense boolean masks and biases are read tile by tile.
Heads    D and E are cut into powers of two from 16 on (80 = 64 + 16).
Rounding scores, softmax and sums are fp32; p and ds are rounded to v's and k's dtype for their
         products, o and the gradients once at the end. fp32 inputs are multiplied in fp32, in
         TF32 where torch.set_float32_matmul_precision allows it.
Dropout  a weight stays by a Philox number of (seed, head of the batch, row, key), forward and back.
Order    o, lse and dq of a row do not depend on the batch; dk and dv are summed over the query
         heads of a group and their rows in a fixed order: no atomics, bit-equal reruns.
Hopper   calls that paths.py gives to the kernels in Gluon, which round and sum alike; those of path
         "gluon_fused" add dq up by atomics.
Source   Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention import _triton_backward, _triton_decode, _triton_forward
from swathe.kernels.attention._triton_blocks import (
    Blocks,
    Cut,
    cut,
    tiles_by_tma,
)
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.op import empty_backward, empty_forward
from swathe.kernels.attention.paths import path
from swathe.kernels.core.device import guard
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import unit_rows

__all__ = ["backward", "backward_bias", "decode", "forward"]

_forward_at = Launcher(_triton_forward.forward)
_backward_q_at = Launcher(_triton_backward.backward_q)
_backward_kv_at = Launcher(_triton_backward.backward_kv)
_backward_bias_at = Launcher(_triton_backward.backward_bias)


def _on_hopper(
    taken: str, which: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> ModuleType | None:
    """The launchers of a path in Gluon, where they serve the call."""
    if not (q.numel() and k.numel() and v.numel()):
        return None
    if taken == "gluon_fused":
        fused = import_module("swathe.kernels.attention._gluon_fused")
        if fused.why_not(q, k, v, Rows(*rest)) is None:
            return fused
    hopper = import_module("swathe.kernels.attention._gluon_sm90")
    return hopper if hopper.why_not(which, q, k, v, *rest) is None else None


def _heads_first(t: Tensor) -> tuple[int, int, int]:
    """Strides of (B, T, H, E) in the order batch, head, row."""
    return t.stride(0), t.stride(2), t.stride(1)


def _constants(q: Tensor, made: Cut, rows: Rows, tma: bool, block: Blocks) -> tuple[Any, ...]:
    ieee = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if ieee else "tf32"
    shape = (made.of_d, made.of_e, made.exact)
    return *rows.flags, *shape, tma, precision, block.queries, block.keys


def _tiles(t: Tensor, rows: int, tma: bool) -> Any:
    """(batch, heads, rows, features) as a kernel's stream of tiles takes it."""
    if not tma:
        return t
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, t.shape[3]])


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; `rest` are the fields of Rows."""
    taken = path("forward", q, v)
    if taken != "portable" and (hopper := _on_hopper(taken, "forward", q, k, v, *rest)):
        return hopper.forward(q, k, v, *rest)
    o, lse = empty_forward(q, k, v)
    (B, H, T, D), E, rows = q.shape, v.shape[3], Rows(*rest)
    made = cut(q, v, rows.dense)
    if not B * H * T * E:
        return o, lse
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    block = made.forward
    tma = not rows.padded and tiles_by_tma(k, v)
    with guard(q):
        _forward_at(
            (cdiv(T, block.queries) * H * B, 1, 1),
            (q, _tiles(k, block.keys, tma), _tiles(v, block.keys, tma), o, lse, rows.first,
             rows.last, rows.places, rows.sinks, *rows.masks),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_heads_first(o), *rows.bounds,
             *rows.strides(H), D, E),
            rows.numbers(q, k),
            _constants(q, made, rows, tma, block),
            block.warps,
            block.stages,
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the rows' statistics, as op.py says."""
    taken = path("backward", q, v)
    if taken != "portable" and (hopper := _on_hopper(taken, "backward", q, k, v, *rest)):
        return hopper.backward(do, dlse, q, k, v, o, lse, *rest)
    dq, dk, dv, stats = empty_backward(do, dlse, q, k, v, o, lse)
    (B, H, T, D), (S, E), rows = q.shape, v.shape[2:], Rows(*rest)
    made = cut(q, v, rows.dense)
    if not B * H * T:
        return dq, dk.zero_(), dv.zero_(), stats
    do, q, k, v, o = unit_rows(do), unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(o)
    block = made.backward_q
    tma = not rows.padded and tiles_by_tma(k, v)
    tiles = cdiv(T, block.queries)
    seen = torch.empty(B, 2, stats.shape[3], dtype=torch.int32, device=q.device)
    reach = torch.empty(B, tiles, 2, dtype=torch.int32, device=q.device)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with guard(q):
        _backward_q_at(
            (tiles * H * B, 1, 1),
            (do, dlse, q, _tiles(k, block.keys, tma), _tiles(v, block.keys, tma), o, lse, dq,
             stats, seen, reach, rows.first, rows.last, rows.places, *rows.masks),
            (*_heads_first(do), *inputs, *_heads_first(o), *dq.stride()[:3], *rows.bounds,
             *rows.strides(H), D, E),
            rows.numbers(q, k),
            _constants(q, made, rows, tma, block),
            block.warps,
            block.stages,
        )  # fmt: skip
        if S:
            _backward_kv(do, q, k, v, dk, dv, stats, seen, reach, rows, block.queries)
    return dq, dk, dv, stats


def _backward_kv(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    stats: Tensor,
    seen: Tensor,
    reach: Tensor,
    rows: Rows,
    queries: int,
) -> None:
    (B, H, _, D), (K, S, E), made = q.shape, v.shape[1:], cut(q, v, rows.dense)
    block = made.backward_kv
    by_head = do.transpose(1, 2)
    tma = tiles_by_tma(q, by_head)
    _backward_kv_at(
        (cdiv(S, block.keys) * K * B, 1, 1),
        (k, v, _tiles(q, block.queries, tma), _tiles(by_head, block.queries, tma), stats, seen,
         reach, dk, dv, rows.places, *rows.masks),
        (*by_head.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *dk.stride()[:3], *dv.stride()[:3], *rows.strides(H), D, E),
        rows.numbers(q, k),
        (*_constants(q, made, rows, tma, block), queries // block.queries),
        block.warps,
        block.stages,
    )  # fmt: skip


def decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o and lse2 of few queries over a cache; `rest` as _triton_decode.decode."""
    taken = path("decode", q, v)
    if taken != "portable" and (hopper := _on_hopper(taken, "decode", q, k, v, *rest)):
        return hopper.decode(q, k, v, *rest)
    return _triton_decode.decode(q, k, v, *rest)


def backward_bias(do: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, *rest: Any) -> Tensor:
    """dbias, in the bias's shape and dtype, summed in fp32 over what it is broadcast to."""
    rows = Rows(*rest)
    assert rows.bias is not None
    (B, H, T, D), (_, S, E) = q.shape, v.shape[1:]
    dbias = torch.zeros_like(rows.bias, memory_format=torch.contiguous_format)
    if not B * H * T * S:
        return dbias
    do, q, k, v = unit_rows(do), unit_rows(q), unit_rows(k), unit_rows(v)
    made = cut(q, v, rows.dense)
    block = made.backward_q
    b, h, t, s = rows.bias.shape
    tiles = (cdiv(t, block.queries), cdiv(s, block.keys))
    with guard(q):
        _backward_bias_at(
            (tiles[0] * tiles[1] * h * b, 1, 1),
            (do, q, k, v, stats, dbias, rows.first, rows.last, rows.places, *rows.masks),
            (*_heads_first(do), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *rows.bounds,
             *rows.strides(H), D, E),
            (*rows.numbers(q, k), B, b, h, t, s),
            _constants(q, made, rows, False, block),
            block.warps,
            block.stages,
        )  # fmt: skip
    return dbias
