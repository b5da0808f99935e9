"""Attention's forward in Gluon on Hopper: what it serves, descriptors, and the launch.

Shapes, masks, rounding and lse2 are those of _triton.py. Heads of up to 256 features are copied by
the TMA wherever they lie in memory: (B, S, H, D) is read and o written there without a copy.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention import _gluon_forward
from swathe.kernels.attention._gluon_blocks import (
    COMPUTE,
    COPY,
    QUERIES,
    REGISTERS,
    SECTION,
    boxes,
    forward_blocks,
)
from swathe.kernels.attention._triton_blocks import generation
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.op import empty_forward
from swathe.kernels.core.device import guard, multiprocessors
from swathe.kernels.core.gluon import TensorDescriptor, gl
from swathe.kernels.core.launch import Launcher, cdiv

_WIDEST = 256
_GROUP = 64  # rows that a warpgroup has of a tile

_forward_at = Launcher(_gluon_forward.forward)


def why_not(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> str | None:
    """Why these kernels cannot serve a call, or None: what was given, and what is allowed."""
    parts = {
        "keys": rows.keys, "allowed": rows.allowed, "bias": rows.bias, "dropout": rows.seed
    }  # fmt: skip
    given = [name for name, part in parts.items() if part is not None]
    if given:
        return f"{given[0]} needs a number for every pair of row and key; allowed: row intervals"
    if rows.padded:
        return "keys past a sequence's end may hold NaN, which whole tiles would take in"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {q.dtype}; allowed: torch.bfloat16 and torch.float16"
    if (made := generation(q.device)) != "hopper":
        return f"the GPU is of the generation {made!r}; allowed: 'hopper'"
    for name, t in (("q", q), ("k", k), ("v", v)):
        reason = why_no_copies(name, t)
        if reason is not None:
            return reason
    return None


def why_no_copies(name: str, t: Tensor, widest: int | None = None) -> str | None:
    """Why the TMA cannot copy boxes of (batch, heads, rows, features)."""
    step, most = 16 // t.element_size(), widest or _WIDEST
    if not 0 < t.shape[3] <= most or t.shape[3] % step:
        return f"{name} has {t.shape[3]} features a head; allowed: multiples of {step} up to {most}"
    if not t.numel():
        return f"{name} is empty, of shape {tuple(t.shape)}"
    if t.data_ptr() % 16:
        return f"{name} does not begin at a multiple of 16 bytes"
    if t.stride(3) != 1 or any(s <= 0 or s % step for s in _strides(t)[:3]):
        return (
            f"{name} has strides {t.stride()}; allowed: adjacent features and other strides that "
            f"are multiples of {step}"
        )
    return None


def _strides(t: Tensor) -> list[int]:
    """Strides, those of dimensions of size 1 replaced by any that the TMA takes."""
    dense = t.shape[3]
    return [dense if n == 1 else s for n, s in zip(t.shape[:3], t.stride(), strict=False)] + [1]


@lru_cache(maxsize=16)
def _layout(width: int) -> Any:
    """Shared memory of boxes of 16-bit features: swizzled over as many bytes as a row has."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=4)


def descriptors(t: Tensor, rows: int) -> tuple[Any, Any]:
    """Descriptors of the one or two boxes of `rows` rows that hold a head of t (B, H, S, D)."""
    made = [box_of(t, rows, width) for width in boxes(t.shape[3])]
    return made[0], made[1] if len(made) == 2 else None


def box_of(t: Tensor, rows: int, width: int) -> Any:
    """A descriptor of boxes of `rows` rows and `width` features of t (B, H, S, D)."""
    box = [1, 1, rows, width]
    return TensorDescriptor(t, list(t.shape), _strides(t), box, _layout(min(width, 64)))


def section(heads: int, groups: int, S: int, features: int) -> int:
    """Query heads, of all sequences, that take turns: their keys and values share the L2 cache."""
    return min(heads, groups * max(1, SECTION // (2 * S * features)))


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; `rest` are the fields of Rows."""
    o, lse = empty_forward(q, k, v)
    (B, H, T, D), (_, K, S, E), rows = q.shape, v.shape, Rows(*rest)
    if not B * H * T:
        return o, lse
    if rows.alibi is not None and rows.places is None:
        # slopes with places that the kernel makes itself spill in its loops
        row = torch.arange(S - T, S, dtype=torch.int32, device=q.device)
        rows = rows._replace(places=row[None])
    block = forward_blocks(D, E)
    bound_b, bound_t, place_b, alibi_b = *rows.bounds, *rows.strides(H)[:2]
    with guard(q):
        _forward_at(
            (min(multiprocessors(q.device), cdiv(T, QUERIES) * H * B), 1, 1),
            (lse, *descriptors(q, _GROUP), *descriptors(k, block.keys),
             *descriptors(v, block.keys), *descriptors(o.transpose(1, 2), _GROUP), rows.first,
             rows.last, rows.places, rows.sinks, rows.alibi,
             torch.zeros(1, dtype=torch.int32, device=q.device)),
            (bound_b, bound_t, place_b, alibi_b),
            (T, S, H, H // K, B * H, section(B * H, H // K, S, D + E),
             float(rows.scale), float(rows.softcap)),
            (*rows.flags, block.shared, block.keys, block.stages, COMPUTE, COPY),
            num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return o, lse
