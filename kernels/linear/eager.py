"""Projections in plain PyTorch: the meaning of the op.

    y_i[..., n] = sum_k x[..., k] * weight_i[n, k] + bias_i[n]

Shapes   x (..., K), weight_i (N_i, K), bias_i (N_i,) or None, y_i (..., N_i).
Dtypes   any floating point; all tensors alike, but under autocast.
Rounding torch's: sums in fp32 (fp64 for fp64), rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Every projection of x; differentiable by autograd and traceable."""
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
