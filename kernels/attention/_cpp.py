"""Attention in C++ (csrc/attention.cpp), forward, backward and decoding; for CPUs.

    z[t, s] = the scores of spec.py, times log2(e)      p = exp2(z - lse2)     o = p v / sum(p)

Shapes   as _triton.py.  Query rows of a group's heads share their keys: a block is 64 of them.
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
from swathe.kernels.core.cpp import TYPE_CODES, call
from swathe.kernels.core.rows import unit_rows

# Forward of csrc/attention.h: pointers; types and sizes; strides; masks; numbers
_FORWARD = Struct("=14Q 9q 12q 7q 8q q 3d")
# what Attention adds: pointers; strides; the bias's sizes
_BACKWARD = Struct("=7Q 12q 5q")
_NONE = (0, 0, 0, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; `rest` as op.py gives it."""
    *rows, seed, scale, softcap, _, _ = rest
    assert seed is None, "dropout is not among this backend's capabilities"
    o, lse = empty_forward(q, k, v)
    if o.numel():
        _run("swathe_attention_forward", q, k, v, o, lse, rows, None, scale, softcap)
    return o, lse


def decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`forward` of few queries against many keys, or a cache in pages."""
    *rows, table, scale, softcap = rest
    o, lse = empty_forward(q, k, v)
    if o.numel():
        _run("swathe_attention_decode", q, k, v, o, lse, rows, table, scale, softcap)
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
    stats[..., q.shape[2] :].zero_()
    do, o = unit_rows(do), unit_rows(o)
    more = _BACKWARD.pack(
        do.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        0,
        stats.data_ptr(),
        *_heads_first(do),
        *dq.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        stats.shape[3],
        *_NONE,
    )
    _run("swathe_attention_backward", q, k, v, o, lse, rows, None, scale, softcap, more)
    return dq, dk, dv, stats


def backward_bias(do: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, *rest: Any) -> Tensor:
    """dbias, in the bias's shape and dtype, summed in fp32 over what it is broadcast to."""
    *rows, _, scale, softcap, _, _ = rest
    bias = rows[5]
    dtype = bias.dtype if bias.dtype in TYPE_CODES else torch.float32
    dbias = torch.zeros(bias.shape, dtype=dtype)
    if q.numel() and k.shape[2]:
        do, places = unit_rows(do), (0,) * 9
        at = (do.data_ptr(), 0, 0, 0, 0, dbias.data_ptr(), stats.data_ptr())
        more = _BACKWARD.pack(*at, *_heads_first(do), *places, stats.shape[3], *bias.shape)
        none = q.new_empty(0)  # o and lse, which dbias needs no longer
        name = "swathe_attention_backward_bias"
        _run(name, q, k, v, none.view(0, 0, 0, 0), none, rows, None, scale, softcap, more)
    return dbias.to(bias.dtype)


def _run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rows: list[Any],
    table: Tensor | None,
    scale: float,
    softcap: float,
    more: bytes = b"",
) -> None:
    first, last, places, keys, allowed, bias, sinks, alibi = rows
    # names for the copies, which must outlive the call
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (B, H, T, D), (_, K, S, E) = q.shape, v.shape
    masks, page, lowest = _NO_MASKS, 1, 0.0
    if table is not None:
        table, page = table.int().contiguous(), S
        S = page * table.shape[1]
    if bias is not None:
        lowest = torch.finfo(bias.dtype).min
        bias = bias if bias.dtype in TYPE_CODES else bias.float()
    if any(t is not None for t in (places, keys, allowed, bias, sinks, alibi, table)):
        keys = None if keys is None else unit_rows(keys)
        tensors = (places, keys, allowed, bias, sinks, alibi, table)
        masks = tuple(0 if t is None else t.data_ptr() for t in tensors)
    packed = _FORWARD.pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        o.data_ptr(),
        lse.data_ptr(),
        first.data_ptr(),
        last.data_ptr(),
        *masks,
        TYPE_CODES[q.dtype],
        0 if bias is None else TYPE_CODES[bias.dtype],
        B, H, K, T, S, D, E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_heads_first(o),
        *strides_of(first),
        0 if places is None else strides_of(places)[0],
        0 if keys is None else strides_of(keys)[0],
        H if alibi is not None and alibi.dim() == 2 else 0,
        0 if table is None else table.stride(0),
        page,
        *(_NONE if allowed is None else strides_of(allowed)),
        *(_NONE if bias is None else strides_of(bias)),
        torch.get_num_threads(),
        scale,
        softcap,
        lowest,
    )  # fmt: skip
    if call(name, packed + more):
        raise MemoryError(f"attention: no memory for the scratch rows of {D} and {E} features")


_NO_MASKS: tuple[int, ...] = (0,) * 7


def _heads_first(t: Tensor) -> tuple[int, int, int]:
    """Strides of (B, T, H, E) in the order batch, head, row."""
    batch, row, head, _ = t.stride()
    return batch, head, row
