"""Backward of attention on Hopper: what the kernels serve, their tiles, and their launches."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention import _gluon_backward_kv, _gluon_backward_q
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.op import empty_backward
from swathe.kernels.core.device import guard
from swathe.kernels.core.gluon import TensorDescriptor, gl
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import unit_rows

__all__ = ["backward", "why_not"]

_backward_q_at = Launcher(_gluon_backward_q.backward_q)
_backward_kv_at = Launcher(_gluon_backward_kv.backward_kv)
_TILE = gl.NVMMASharedLayout(128, 16, 4)
_NUMBERS = gl.NVMMASharedLayout(0, 32, 2)
_GROUP = 64  # rows of a warpgroup
_WARPS, _STARTING, _WORKING, _COPYING = 4, 168, 240, 24  # warps and registers of a thread


class OfQ(NamedTuple):
    """Tiles of backward_q, of 128 queries: keys, and stages of keys and of values."""

    keys: int
    k_stages: int
    v_stages: int


class OfKV(NamedTuple):
    """Tiles of backward_kv: queries, their stages, and whether warpgroups share 64 keys."""

    queries: int
    stages: int
    shared: bool


# the wider head of a row; 0 spills in loops, all exponentials beside a product
_PLAIN = {
    64: (OfQ(128, 2, 2), OfKV(64, 3, False)),
    128: (OfQ(128, 2, 2), OfKV(64, 2, False)),
    192: (OfQ(64, 2, 2), OfKV(64, 2, True)),
    256: (OfQ(64, 2, 1), OfKV(64, 2, True)),
}
# slopes of ALiBi and a softcap's tanh take registers
_SCORED = {
    64: (OfQ(64, 2, 2), OfKV(64, 3, False)),
    128: (OfQ(64, 2, 2), OfKV(32, 3, False)),
    192: (OfQ(32, 2, 2), OfKV(64, 2, True)),
    256: (OfQ(32, 2, 2), OfKV(32, 3, True)),
}


def why_not(do: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> str | None:
    return None


def blocks_for(D: int, E: int, scored: bool) -> tuple[OfQ, OfKV]:
    """Tiles of both kernels for heads of D and E features."""
    table = _SCORED if scored else _PLAIN
    return next(table[width] for width in table if max(D, E) <= width)


def widths(features: int) -> tuple[int, ...]:
    """Boxes that features are copied in; a last one may reach past them, where copies bring 0."""
    return (128, 64) if 128 < features <= 192 else (max(64, 1 << (features - 1).bit_length()),)


def boxes(t: Tensor, rows: int) -> tuple[Any, Any]:
    """Descriptors of (batch, heads, rows, features), one for each of widths, then None."""
    found = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, width], _TILE)
        for width in widths(t.shape[3])
    ]
    return found[0], found[1] if len(found) == 2 else None


def _numbers(t: Tensor, rows: int) -> Any:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, rows], _NUMBERS)


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
    dq, dk, dv, stats = empty_backward(do, dlse, q, k, v, o, lse)
    (B, H, T, D), (_, K, S, E), rows = q.shape, v.shape, Rows(*rest)
    do, q, k, v, o = unit_rows(do), unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(o)
    of_q, of_kv = blocks_for(D, E, rows.alibi is not None or rows.softcap != 0.0)
    tiles, span = cdiv(T, 2 * _GROUP), stats.shape[3]
    seen = torch.empty(B, 2, span, dtype=torch.int32, device=q.device)
    reach = torch.empty(B, tiles, 2, dtype=torch.int32, device=q.device)
    whole = torch.empty_like(reach)
    by_head = do.transpose(1, 2)
    place_b, alibi_b = rows.strides(H)[:2]
    numbers = (T, S, H, H // K, S - T, float(rows.scale), float(rows.softcap))
    with guard(q):
        _backward_q_at(
            (tiles * H * B, 1, 1),
            (do, dlse, o, lse, stats, seen, reach, whole, rows.first, rows.last, rows.places,
             rows.alibi, *boxes(by_head, _GROUP), *boxes(q, _GROUP), *boxes(k, of_q.keys),
             *boxes(v, of_q.keys), *boxes(dq, _GROUP)),
            (*by_head.stride()[:3], *o.transpose(1, 2).stride()[:3], *rows.bounds, place_b,
             alibi_b, E),
            numbers,
            (*rows.flags, *of_q, _WORKING, _COPYING),
            _WARPS,
            maxnreg=_STARTING,
        )  # fmt: skip
        keys = _GROUP if of_kv.shared else 2 * _GROUP
        _backward_kv_at(
            (cdiv(S, keys) * K * B, 1, 1),
            (reach, whole, rows.places, rows.alibi, _numbers(stats.view(-1, span), of_kv.queries),
             _numbers(seen.view(-1, span), of_kv.queries), *boxes(k, _GROUP), *boxes(v, _GROUP),
             *boxes(q, of_kv.queries), *boxes(by_head, of_kv.queries), *boxes(dk, _GROUP),
             *boxes(dv, _GROUP)),
            (place_b, alibi_b),
            numbers,
            (*rows.flags, *of_kv, _WORKING, _COPYING),
            _WARPS,
            maxnreg=_STARTING,
        )  # fmt: skip
    return dq, dk, dv, stats
