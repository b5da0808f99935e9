"""qk_norm_rotary in C++ (csrc/qk_norm_rotary.cpp): tensors in, tensors out; for CPUs.

The formulas and roundings are those of eager.py. y and dx are computed alike whatever the number of
threads, which are torch's; gradients of the weights are summed over blocks of tokens whose number
depends on the shape alone. A position outside its table raises IndexError before anything is
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
from swathe.kernels.core.rotation import angles
from swathe.kernels.core.rows import unit_rows
from swathe.kernels.qk_norm_rotary.op import empty_backward, empty_forward

# Normed of csrc/qk_norm_rotary.cpp: heads with gradient, weight and the place of its scale
_NORMED = f"{HEADS}Q3qQQ"
_PACKED = Struct(f"={TURNING}{_NORMED}{_NORMED}Q7q2d")
_NOTHING = (*NO_HEADS, *(0,) * 6)


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    norm_casting: str,
    casting: str,
    *rotation: Any,
) -> list[Tensor]:
    """q, and k where there is one, normalised and turned; `rotation` is core.rotation.angles'."""
    found = empty_forward(q, k)
    if any(t.numel() for t in found):
        # a row of operands for q, and one for k where there is one
        operands = [(q, None, q_weight), (k, None, k_weight)]
        rounding = _rounding(norm_casting, casting, rotation[0].dtype == q.dtype)
        _run("forward", operands, found, None, (rounding, eps, offset), rotation)
    return found


def backward(
    dyq: Tensor,
    dyk: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    *rotation: Any,
) -> list[Tensor]:
    """The gradients of q, of k where there is one, and of the weights, end to end."""
    found = empty_backward(dyq, dyk, q, k, q_weight)
    if any(t.numel() for t in found[:-1]):
        operands = [(q, dyq, q_weight), (k, dyk, k_weight)]
        _run("backward", operands, found, found[-1], (0, eps, offset), rotation)
    else:
        found[-1].zero_()
    return found


def _rounding(norm_casting: str, casting: str, tables_in_heads_dtype: bool) -> int:
    # csrc/qk_norm_rotary.cpp: Rounding
    if casting != "llama":
        return 0
    return (3 if norm_casting == "llama" else 1) + tables_in_heads_dtype


def _run(
    way: str,
    operands: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
    found: list[Tensor],
    dw: Tensor | None,
    numbers: tuple[int, float, float],
    rotation: tuple[Any, ...],
) -> None:
    *_, rotary_dim, interleaved = rotation
    turning, (rounding, eps, offset) = angles(*rotation), numbers
    # `held` keeps copies until the call has returned
    held: list[Tensor | None] = []
    fields: list[int] = []
    for (x, dy, weight), y in zip(operands, (found[0], found[1 % len(found)]), strict=True):
        if x is None or weight is None:
            fields += _NOTHING
            continue
        x, dy, weight = unit_rows(x), None if dy is None else unit_rows(dy), weight.contiguous()
        held += [x, dy, weight]
        arriving = (0, 0, 0, 0) if dy is None else (dy.data_ptr(), *dy.stride()[:3])
        fields += [*heads_fields(x, y), *arriving, weight.data_ptr(), 0]
    q, w = held[0], held[2]
    assert q is not None and w is not None
    B, _, S, D = q.shape
    packed = _PACKED.pack(
        *turning_fields(turning, rotary_dim, interleaved),
        *fields,
        0 if dw is None else dw.data_ptr(),
        TYPE_CODES[q.dtype],
        TYPE_CODES[w.dtype],
        B,
        S,
        D,
        rounding,
        torch.get_num_threads(),
        eps,
        offset,
    )
    failed = call(f"swathe_qk_norm_rotary_{way}", packed)
    raise_if(failed, "qk_norm_rotary", turning, rotary_dim)
