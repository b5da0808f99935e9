"""Rotary embedding in C++ (csrc/rotary.cpp): tensors in, tensors out; for CPUs.

The formulas and roundings are those of eager.py, each element computed alike whatever the number of
threads, which are torch's. A position outside its table raises IndexError before anything is
written; eager code counts negative ones from the end, this does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.cpp import TYPE_CODES, entry
from swathe.kernels.core.rotation import Angles
from swathe.kernels.core.rows import unit_rows
from swathe.kernels.rotary.op import empty, launchers

# Rotation of csrc/rotary.cpp: q, k, tables and how they are read, sizes and switches
_PACKED = Struct("=2Q7q2Q7q3Q20q")


def _run(
    q: Tensor,
    k: Tensor | None,
    turning: Angles,
    pairs: Sequence[Any],
    rounded: bool,
    back: bool,
) -> list[Tensor]:
    found, (rotary_dim, interleaved) = empty(q, k), pairs
    B, _, S, D = q.shape
    # names for the copies, which must outlive the call
    q, k = unit_rows(q), None if k is None else unit_rows(k)
    of_q = _heads(q, found[0])
    of_k = _NO_HEADS if k is None else _heads(k, found[1])
    (cos, sin, positions), strides, sizes, (form, indexed, mrope) = turning
    packed = _PACKED.pack(
        *of_q,
        *of_k,
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr() if indexed else 0,
        positions.dtype == torch.int64,
        *strides,
        *sizes,
        form,
        mrope,
        TYPE_CODES[q.dtype],
        TYPE_CODES[cos.dtype],
        B,
        S,
        D,
        rotary_dim,
        interleaved,
        rounded,
        back,
        torch.get_num_threads(),
    )
    failed = entry("swathe_rotary")(packed)
    if failed == 2:
        raise IndexError(
            f"rotary: positions go from {int(positions.min())} to {int(positions.max())}; the "
            f"tables have {sizes[0]} rows, so they must be 0 to {sizes[0] - 1}"
        )
    if failed:
        raise MemoryError(f"rotary: no memory for the angles of {rotary_dim} features")
    return found


forward, backward = launchers(_run)
_NO_HEADS = (0,) * 9


def _heads(x: Tensor, y: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), y.data_ptr(), x.shape[1], *x.stride()[:3], *y.stride()[:3]
