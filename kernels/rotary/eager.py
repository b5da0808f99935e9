"""Rotary position embedding in plain PyTorch: the meaning of the op.

    y1 = x1 * c1 - x2 * s1        for each of the R/2 pairs (x1, x2) of features of a head
    y2 = x2 * c2 + x1 * s2        y = x for the features past the R that are in pairs

Shapes   q, k, y: (B, H, S, D) with any strides.  Pairs, tables, positions and mrope sections:
         core/rotation.py.
Dtypes   fp32, or fp64 for fp64 input; outputs have the dtype of q and k.
Rounding casting "fp32": once, at the end.  casting "llama": products and sum are formed, each
         rounded, in the dtype that x and the tables promote to, as HF's apply_rotary_pos_emb does,
         bit for bit where the tables have x's dtype (HF casts them); with wider tables HF returns
         the wide dtype, which is here rounded to x's.
Source   Su et al. 2021, arXiv:2104.09864, eq. 34.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swathe.kernels.core.rotation import members, turned


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    mrope_section: Sequence[int] | None,
    rotary_dim: int,
    interleaved: bool,
    casting: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The rotated q, or (q, k); differentiable by autograd, fp64-capable, traceable."""
    c1, c2 = members(cos, positions, mrope_section, rotary_dim, interleaved)
    s1, s2 = members(sin, positions, mrope_section, rotary_dim, interleaved)

    def one(x: Tensor) -> Tensor:
        if casting == "llama":
            return turned(x, (c1, s1, c2, s2), interleaved).to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = (c1.to(wide), s1.to(wide), c2.to(wide), s2.to(wide))
        return turned(x.to(wide), angles, interleaved).to(x.dtype)

    return one(q) if k is None else (one(q), one(k))
