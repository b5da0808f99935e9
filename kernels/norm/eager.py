"""RMSNorm in plain PyTorch: the meaning of the op.

    h[m, n] = x[m, n] + residual[m, n]                 h = x without a residual
    rstd[m] = 1 / sqrt(mean_n(h[m, n]^2) + eps)
    y[m, n] = h[m, n] * rstd[m] * (offset + w[n])

Shapes   x, residual, h, y: (..., N) with any strides.  weight: (N,).
Dtypes   statistics in fp32, in fp64 for fp64 input.  h has the dtype that `x + residual` has.
Rounding casting "llama": h * rstd is rounded to h's dtype, then the product with the weight to
         promote(h, weight), as HF's LlamaRMSNorm does, bit for bit.  "gemma" and "fp32": one
         rounding, to h's dtype; "gemma" with offset=1 is HF's GemmaRMSNorm, bit for bit.
Source   Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; the castings are transformers' own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, h) with a residual; differentiable by autograd, fp64-capable, traceable."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(h.dtype, torch.float32)
    xhat = h.to(wide)
    xhat = xhat * torch.rsqrt(xhat.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        scale = weight if offset == 0 else offset + weight.to(wide)
        y = (scale * xhat.to(h.dtype)).to(torch.promote_types(h.dtype, weight.dtype))
    else:
        y = (xhat * (offset + weight.to(wide))).to(h.dtype)
    return y if residual is None else (y, h)
