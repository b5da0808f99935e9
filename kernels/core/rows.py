"""Activations (..., N) as M rows of N features with one row stride, copied only if needed."""

from __future__ import annotations

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
