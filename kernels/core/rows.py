"""Activations (..., N) as M rows of N features with one row stride, copied only if needed."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(t: Tensor) -> tuple[Tensor, int]:
    """`t` (..., N) and its row stride in elements; features are contiguous in the result.

    A layout whose leading dimensions do not merge into one stride (a transposed batch, say) or
    whose features are not adjacent is copied; everything else, contiguous or not, is a view.
    """
    N = t.shape[-1]
    if t.is_contiguous():
        return t, N
    if t.stride(-1) != 1 and N > 1:
        return t.contiguous(), N
    t = t.reshape(-1, N)
    return t, t.stride(0)


def unit_rows(t: Tensor) -> Tensor:
    """`t` itself if its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Uninitialised (B, H, S, D), dense, its tokens and heads in the order of x's memory."""
    _, H, S, D = x.shape
    strides = (H * S * D, D, H * D, 1) if x.stride(1) < x.stride(2) else (H * S * D, S * D, D, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
