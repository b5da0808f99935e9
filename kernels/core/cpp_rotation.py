"""The angles of a rotation as csrc/angles.h takes them, and what its ops report."""

from __future__ import annotations

import torch
from torch import Tensor

from swathe.kernels.core.cpp import TYPE_CODES
from swathe.kernels.core.rotation import Angles

# formats of csrc/angles.h: Turning and Heads
TURNING, HEADS = "3Q13q", "2Q7q"
NO_HEADS = (0,) * 9


def turning_fields(turning: Angles, rotary_dim: int, interleaved: bool) -> tuple[int, ...]:
    """Turning; `turning` must be kept until the call has returned."""
    (cos, sin, positions), strides, sizes, (form, indexed, mrope) = turning
    return (
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr() if indexed else 0,
        positions.dtype == torch.int64,
        *strides,
        *sizes,
        form,
        mrope,
        TYPE_CODES[cos.dtype],
        rotary_dim,
        interleaved,
    )


def heads_fields(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Heads; both tensors must be kept until the call has returned."""
    return x.data_ptr(), y.data_ptr(), x.shape[1], *x.stride()[:3], *y.stride()[:3]


def raise_if(failed: int, op: str, turning: Angles, rotary_dim: int) -> None:
    """IndexError or MemoryError for what an entry point returned."""
    if failed == 2:
        positions, rows = turning.tensors[2], turning.plain[0]
        raise IndexError(
            f"{op}: positions go from {int(positions.min())} to {int(positions.max())}; the "
            f"tables have {rows} rows, so they must be 0 to {rows - 1}"
        )
    if failed:
        raise MemoryError(f"{op}: no memory for the angles of {rotary_dim} features")
