"""qk_norm_rotary in plain PyTorch: the meaning of the op.

    xhat[n]  = x[n] / sqrt(mean_n(x[n]^2) + eps)       each head of each token of q and of k
    h[n]     = xhat[n] * (offset + w[n])               q and k have weights of their own
    y1, y2   = h1 * c1 - h2 * s1,  h2 * c2 + h1 * s2   for each of the R/2 pairs; y = h past R

Shapes   q (B, H, S, D), k (B, Hk, S, D) or None, any strides; q_weight, k_weight (D,).
         Pairs, tables, positions and mrope sections as in kernels/core/rotation.py.
Dtypes   y has x's dtype.  Statistics in fp32, in fp64 for fp64 input.
Rounding casting "fp32": one rounding, to x's dtype; norm_casting is not looked at.
         casting "llama", with tables of x's dtype, is HF's attention bit for bit: norm_casting
         "llama" rounds xhat, then h (Qwen3RMSNorm); "gemma" and "fp32" round h alone (Gemma3RMSNorm
         with offset=1); then every product and the sum of apply_rotary_pos_emb.  Wider tables
         widen products and sum as torch promotes them, and y is rounded from there.
Source   Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Su et al. 2021, arXiv:2104.09864, eq. 34.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swathe.kernels.core.rotation import members, turned


def qk_norm_rotary(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    norm_casting: str,
    casting: str,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    mrope_section: Sequence[int] | None,
    rotary_dim: int,
    interleaved: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The rotated q, or (q, k); differentiable by autograd, fp64-capable, traceable."""
    c1, c2 = members(cos, positions, mrope_section, rotary_dim, interleaved)
    s1, s2 = members(sin, positions, mrope_section, rotary_dim, interleaved)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        h = normalised(x, weight, eps, offset, norm_casting, casting)
        if casting == "llama":
            return turned(h, (c1, s1, c2, s2), interleaved).to(x.dtype)
        angles = (c1.to(h.dtype), s1.to(h.dtype), c2.to(h.dtype), s2.to(h.dtype))
        return turned(h, angles, interleaved).to(x.dtype)

    y = one(q, q_weight)
    if k is None or k_weight is None:
        return y
    return y, one(k, k_weight)


def normalised(
    x: Tensor, weight: Tensor, eps: float, offset: float, norm_casting: str, casting: str
) -> Tensor:
    """h, in x's dtype for casting "llama", else in fp32 (or fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xhat = x.to(wide)
    xhat = xhat * torch.rsqrt(xhat.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama" and norm_casting == "llama":
        scale = weight if offset == 0 else offset + weight.to(wide)
        return (scale * xhat.to(x.dtype)).to(x.dtype)
    h = xhat * (offset + weight.to(wide))
    return h.to(x.dtype) if casting == "llama" else h
