"""Attention's backward in Gluon on Hopper: tiles by head size, descriptors, and the launches.

Shapes, masks and stats are those of _triton.py, what is served that of _gluon.py's `why_not`.
Gradients are written where they belong by copies, in the order of their inputs' memory.

Floor    14 T S D flops a head for D = E and full masks, seven products where a single pass would
         need five: nothing is summed by atomics, so reruns are bit-equal.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention import _gluon_backward_kv, _gluon_backward_q
from swathe.kernels.attention._gluon import descriptors, why_no_copies, why_not
from swathe.kernels.attention._gluon_blocks import COMPUTE, COPY, REGISTERS, boxes
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.op import empty_backward
from swathe.kernels.core.device import guard
from swathe.kernels.core.gluon import TensorDescriptor, gl
from swathe.kernels.core.launch import Launcher, cdiv
from swathe.kernels.core.rows import unit_rows

__all__ = ["backward", "why_not"]

_GROUP = 64  # rows or keys of a warpgroup
_QUERIES = 128  # of a program for dq
_UNSWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)

_backward_q_at = Launcher(_gluon_backward_q.backward_q)
_backward_kv_at = Launcher(_gluon_backward_kv.backward_kv)


class OfQ(NamedTuple):
    """Tiles for dq beside 128 queries: keys, and stages of keys and of values."""

    keys: int
    k_stages: int
    v_stages: int


class OfKV(NamedTuple):
    """Tiles for dk and dv: queries, their stages, and whether two warpgroups share 64 keys."""

    queries: int
    stages: int
    shared: bool


# the wider head of a row, in features of its boxes; no spill in a loop, every exponential beside a
# product (tests/offline). None has been timed yet.
_PLAIN = {
    64: (OfQ(128, 2, 2), OfKV(64, 3, False)),
    128: (OfQ(128, 2, 2), OfKV(64, 2, False)),
    192: (OfQ(64, 2, 2), OfKV(64, 2, True)),
    256: (OfQ(64, 2, 1), OfKV(64, 2, True)),
}
# a softcap's tanh and slopes of ALiBi take registers
_SCORED = {
    64: (OfQ(64, 2, 2), OfKV(64, 3, False)),
    128: (OfQ(64, 2, 2), OfKV(32, 3, False)),
    192: (OfQ(32, 2, 2), OfKV(64, 2, True)),
    256: (OfQ(32, 2, 2), OfKV(32, 3, True)),
}


def blocks_for(D: int, E: int, scored: bool) -> tuple[OfQ, OfKV]:
    """Tiles for heads of D and E features, at most 256; `scored`: by a softcap or by ALiBi."""
    wide = max(sum(boxes(D)), sum(boxes(E)))
    table = _SCORED if scored else _PLAIN
    return next(blocks for most, blocks in table.items() if wide <= most)


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
    """dq, dk, dv and the rows' statistics, as op.py says; `rest` are the fields of Rows.

    A do that the TMA cannot read, such as an expanded one, is copied.
    """
    dq, dk, dv, stats = empty_backward(do, dlse, q, k, v, o, lse)
    rows, (B, H, T, _), E = Rows(*rest), q.shape, v.shape[3]
    if not B * H * T:
        return dq, dk.zero_(), dv.zero_(), stats
    by_head, q, k, v, o = readable(do, q, k, v, o)
    of_q, _ = _blocks(q, v, rows)
    seen, reach, whole = room_for_rows(q, stats)
    with guard(q):
        _backward_q_at(
            (cdiv(T, _QUERIES) * H * B, 1, 1),
            (by_head, dlse, o, lse, stats, seen, reach, whole, rows.first, rows.last, rows.places,
             rows.alibi, *descriptors(by_head, _GROUP), *descriptors(q, _GROUP),
             *descriptors(k, of_q.keys), *descriptors(v, of_q.keys), *descriptors(dq, _GROUP)),
            (*by_head.stride()[:3], *o.stride()[:3], *rows.bounds, *rows.strides(H)[:2], E),
            plain_numbers(q, k, rows),
            (*rows.flags, *of_q, COMPUTE, COPY),
            num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip
        backward_kv(by_head, q, k, v, dk, dv, stats, seen, reach, whole, rows)
    return dq, dk, dv, stats


def readable(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[Tensor, ...]:
    """The same, heads before rows, as the kernels can read them: a do that lies otherwise is
    copied.
    """
    do, q, k, v, o = unit_rows(do), unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(o)
    if why_no_copies("do", do.transpose(1, 2)) is not None:
        do = do.contiguous()
    return do.transpose(1, 2), q, k, v, o.transpose(1, 2)


def room_for_rows(q: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """seen, reach and whole, which one kernel leaves for the next."""
    B, T = q.shape[0], q.shape[2]
    seen = torch.empty(B, 2, stats.shape[3], dtype=torch.int32, device=q.device)
    reach = torch.empty(B, cdiv(T, _QUERIES), 2, dtype=torch.int32, device=q.device)
    return seen, reach, torch.empty_like(reach)


def numbers_of_rows(stats: Tensor, seen: Tensor, queries: int) -> tuple[Any, Any]:
    """Descriptors of the four numbers that `queries` rows have."""
    stats, seen = stats.view(-1, stats.shape[3]), seen.view(-1, stats.shape[3])
    made = [
        TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [1, queries], _UNSWIZZLED)
        for t in (stats, seen)
    ]
    return made[0], made[1]


def backward_kv(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    stats: Tensor,
    seen: Tensor,
    reach: Tensor,
    whole: Tensor | None,
    rows: Rows,
) -> None:
    """Write dk and dv, of do (B, H, T, E) and of what a kernel for dq left of rows.

    reach, whole: (B, tiles of 128 rows, 2); without `whole` every tile is masked.
    """
    (B, H, _, _), (K, S) = q.shape, k.shape[1:3]
    _, block = _blocks(q, v, rows)
    keys = _GROUP if block.shared else 2 * _GROUP
    _backward_kv_at(
        (cdiv(S, keys) * K * B, 1, 1),
        (reach, whole, rows.places, rows.alibi,
         *numbers_of_rows(stats, seen, block.queries),
         *descriptors(k, _GROUP), *descriptors(v, _GROUP), *descriptors(q, block.queries),
         *descriptors(do, block.queries), *descriptors(dk, _GROUP), *descriptors(dv, _GROUP)),
        rows.strides(H)[:2],
        plain_numbers(q, k, rows),
        (*rows.flags, *block, COMPUTE, COPY),
        num_warps=4,
        maxnreg=REGISTERS,
    )  # fmt: skip


def _blocks(q: Tensor, v: Tensor, rows: Rows) -> tuple[OfQ, OfKV]:
    return blocks_for(q.shape[3], v.shape[3], rows.softcap != 0.0 or rows.alibi is not None)


def plain_numbers(q: Tensor, k: Tensor, rows: Rows) -> tuple[int | float, ...]:
    """What both kernels take unspecialised."""
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    return T, S, H, H // K, S - T, float(rows.scale), float(rows.softcap)
