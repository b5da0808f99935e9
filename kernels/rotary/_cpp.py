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

from swathe.kernels.core.cpp import TYPE_CODES, call
from swathe.kernels.core.cpp_rotation import (
    HEADS,
    NO_HEADS,
    TURNING,
    heads_fields,
    raise_if,
    turning_fields,
)
from swathe.kernels.core.rotation import Angles
from swathe.kernels.core.rows import unit_rows
from swathe.kernels.rotary.op import empty, launchers

# Rotation of csrc/rotary.cpp
_PACKED = Struct(f"={TURNING}{HEADS}{HEADS}7q")


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
    packed = _PACKED.pack(
        *turning_fields(turning, rotary_dim, interleaved),
        *heads_fields(q, found[0]),
        *(NO_HEADS if k is None else heads_fields(k, found[1])),
        TYPE_CODES[q.dtype],
        B,
        S,
        D,
        rounded,
        back,
        torch.get_num_threads(),
    )
    raise_if(call("swathe_rotary", packed), "rotary", turning, rotary_dim)
    return found


forward, backward = launchers(_run)
