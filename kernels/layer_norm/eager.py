"""LayerNorm in plain PyTorch: the meaning of the op.

    h[m, n] = x[m, n] + residual[m, n]                     h = x without a residual
    mean[m] = mean_n(h[m, n])
    rstd[m] = 1 / sqrt(mean_n((h[m, n] - mean[m])^2) + eps)
    y[m, n] = (h[m, n] - mean[m]) * rstd[m] * w[n] + b[n]

Shapes   x, residual, h, y: (..., N) with any strides.  w, b: (N,) or absent (1 and 0).
Dtypes   statistics in fp32, in fp64 for fp64 input.  h has the dtype that `x + residual` has, y
         that of h whatever the weights have, as under autocast with weights in fp32.
Rounding once, to h's dtype, as torch's own layer_norm does.
Source   Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 3 and 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, h) with a residual; differentiable by autograd, fp64-capable, traceable."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(h.dtype, torch.float32)
    w, b = (None if t is None else t.to(wide) for t in (weight, bias))
    y = F.layer_norm(h.to(wide), h.shape[-1:], w, b, eps).to(h.dtype)
    return y if residual is None else (y, h)
