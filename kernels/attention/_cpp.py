"""Attention in C++ (csrc/attention.cpp), forward, backward and decoding; for CPUs.

    z[t, s] = the scores of spec.py, times log2(e)      p = exp2(z - lse2)     o = p v / sum(p)

Shapes   as _triton.py.  Query rows of a group's heads share their keys: a block is 48 of them.
Rounding everything is fp32, p and ds included; o and the gradients are rounded once at the end.
Order    a row's o, lse and dq depend on nothing but the row, dk and dv are summed in a fixed order:
         the same bits whatever the batch and the number of threads, which are torch's. Decoding
         cuts keys into parts of 512 and joins them in order.
Source   Dao 2023, arXiv:2307.08691; Dao et al. 2023, "Flash-Decoding", for the parts.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention.op import empty_backward, empty_forward, strides_of
from swathe.kernels.core.cpp import TYPE_CODES, entry
from swathe.kernels.core.rows import unit_rows

# Attention of csrc/attention.h: pointers; types and sizes; strides; masks; numbers
_PACKED = Struct("=22Q 9q 24q 8q 12q q 3d")


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; `rest` as op.py gives it."""
    *rows, seed, scale, softcap, _, _ = rest
    assert seed is None, "dropout is not among this backend's capabilities"
    o, lse = empty_forward(q, k, v)
    if o.numel():
        _run("swathe_attention_forward", q, k, v, rows, scale, softcap, out=o, lse=lse)
    return o, lse


def decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`forward` of few queries against many keys, or a cache in pages."""
    *rows, table, scale, softcap = rest
    o, lse = empty_forward(q, k, v)
    if o.numel():
        _run("swathe_attention_decode", q, k, v, rows, scale, softcap, out=o, lse=lse, table=table)
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
    *rows, _, scale, softcap, _, _ = rest
    dq, dk, dv, stats = empty_backward(do, dlse, q, k, v, o, lse)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), stats
    given = {"do": do, "dlse": dlse, "o": o, "lse": lse, "stats": stats}
    found = {"dq": dq, "dk": dk, "dv": dv}
    _run("swathe_attention_backward", q, k, v, rows, scale, softcap, **given, **found)
    return dq, dk, dv, stats


def backward_bias(do: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, *rest: Any) -> Tensor:
    """dbias, in the bias's shape and dtype, summed in fp32 over what it is broadcast to."""
    *rows, _, scale, softcap, _, _ = rest
    bias = rows[5]
    dtype = bias.dtype if bias.dtype in TYPE_CODES else torch.float32
    dbias = torch.zeros(bias.shape, dtype=dtype)
    if q.numel() and k.shape[2]:
        given = {"do": do, "stats": stats, "dbias": dbias}
        _run("swathe_attention_backward_bias", q, k, v, rows, scale, softcap, **given)
    return dbias.to(bias.dtype)


def _run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: list[Any],
    scale: float,
    softcap: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    table: Tensor | None = None,
    do: Tensor | None = None,
    dlse: Tensor | None = None,
    o: Tensor | None = None,
    stats: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    first, last, places, keys, allowed, bias, sinks, alibi = rows
    lowest = 0.0 if bias is None else torch.finfo(bias.dtype).min
    if bias is not None and bias.dtype not in TYPE_CODES:
        bias = bias.float()
    # names for the copies, which must outlive the call
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    do, o = (None if t is None else unit_rows(t) for t in (do, o))
    keys = None if keys is None else unit_rows(keys)
    table = None if table is None else table.int().contiguous()
    (B, H, T, D), (K, E) = q.shape, v.shape[1::2]
    page = 1 if table is None else k.shape[2]
    S = k.shape[2] if table is None else table.shape[1] * page
    written = out if out is not None else o
    packed = _PACKED.pack(
        *(0 if t is None else t.data_ptr() for t in (
            q, k, v, o, do, first, last, places, keys, allowed, bias, sinks, alibi, table, dlse,
            out, dq, dk, dv, dbias, lse, stats,
        )),
        TYPE_CODES[q.dtype],
        0 if bias is None else TYPE_CODES[bias.dtype],
        B, H, K, T, S, D, E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_strides(None if written is None else written.transpose(1, 2)),
        *_strides(None if do is None else do.transpose(1, 2)),
        *_strides(dq),
        *_strides(dk),
        *_strides(dv),
        *strides_of(first),
        strides_of(places)[0],
        strides_of(keys)[0],
        H if alibi is not None and alibi.dim() == 2 else 0,
        0 if table is None else table.stride(0),
        page,
        0 if stats is None else stats.shape[3],
        *strides_of(allowed),
        *strides_of(bias),
        *((0, 0, 0, 0) if bias is None else bias.shape),
        torch.get_num_threads(),
        scale,
        softcap,
        lowest,
    )  # fmt: skip
    if entry(name)(packed):
        raise MemoryError(f"attention: no memory for the scratch rows of {D} and {E} features")


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """Of (batch, heads, rows, features), which are adjacent."""
    return (0, 0, 0) if t is None else t.stride()[:3]
