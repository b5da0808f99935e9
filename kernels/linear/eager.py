"""Projections in plain PyTorch: the meaning of the op.

    y_i[..., n] = sum_k x[..., k] * weight_i[n, k] + bias_i[n]

Shapes   x (..., K), weight_i (N_i, K), bias_i (N_i,) or None, y_i (..., N_i).
Dtypes   any floating point; all tensors alike, but under autocast.
Rounding torch's: sums in fp32 (fp64 for fp64), rounded once.

A weight in int8 comes with fp32 scales_i (N_i,), and stands for the numbers

    weight_i[n, k] * scales_i[n]

Rounding that product to fp32; sums in fp32, with the bias, and rounded once to x's dtype.
`quantised` makes such weights: symmetric, each row by its largest absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 127  # of int8's numbers; -128 is left out
_AT_ONCE = 1 << 20  # elements that are widened at once


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Every projection of x; differentiable by autograd and traceable."""
    if scales is None:
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    every = zip(weights, biases, scales, strict=True)
    return tuple(F.linear(x, w, b) if s is None else _scaled(x, w, b, s) for w, b, s in every)


def _scaled(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    full = weight.to(scales.dtype) * scales[:, None]
    y = F.linear(x.to(wide), full.to(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


@torch.no_grad()
def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (N, K) and fp32 scales (N,) of a weight (N, K) of floats.

    A row's scale is its largest absolute value / 127, and its numbers are rounded to the nearest
    multiple, ties to even. A row of zeros has scale 0; one that is not finite a scale that is not
    either, so that its outputs are NaN.
    """
    N, K = weight.shape
    numbers = torch.empty(N, K, dtype=torch.int8, device=weight.device)
    scales = torch.zeros(N, dtype=torch.float32, device=weight.device)
    rows = max(1, _AT_ONCE // max(K, 1))
    for start in range(0, N if K else 0, rows):
        some = slice(start, start + rows)
        wide = weight[some].float()
        scale = scales[some].copy_(wide.abs().amax(1) / MOST)
        wide = wide / scale.where(scale > 0, 1.0)[:, None]
        numbers[some] = wide.nan_to_num_(0.0, MOST, -MOST).round_().clamp_(-MOST, MOST)
    return numbers, scales
