"""Attention in plain PyTorch: the meaning of the op.

    p[b, h, t, s] = softmax_s(scale * sum_d q[b, h, t, d] * k[b, h // G, s, d] + bias)
    o[b, t, h, d] = sum_s p[b, h, t, s] * v[b, h // G, s, d]     G = H / K

Shapes   q: (B, H, T, D).  k: (B, K, S, D).  v: (B, K, S, E).  o: (B, T, H, E).
Dtypes   any floating point, fp64 included; q, k and v alike.
Rounding HF Llama's, bit for bit: scores, scaled scores and biased scores are each rounded to q's
         dtype, the softmax is fp32 (fp64 for fp64), rounded to q's dtype; then the product
         with v.
Masks    hidden keys get weight exactly 0; a row that sees no key gives 0 and passes no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.attention.mask import Mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """o, differentiable by autograd and traceable."""
    return attention_with_weights(q, k, v, mask, scale, dropout)[0]


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """o, and the weights p (B, H, T, S) after dropout."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    k, v = _expand_heads(k, H), _expand_heads(v, H)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    hidden = None
    if mask.bias is not None:
        scores = scores + mask.bias.to(scores.dtype)
    if not (mask.trivial and (T == 1 or not mask.causal)):
        hidden = ~mask.visible(T, S, q.device)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    if hidden is not None and mask.rows_may_be_empty:
        # exact zeros already, but for rows that see no key at all
        weights = weights.masked_fill(hidden, 0.0)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return torch.matmul(weights, v).transpose(1, 2), weights


def _expand_heads(t: Tensor, H: int) -> Tensor:
    B, K, S, D = t.shape
    return t if K == H else t[:, :, None].expand(B, K, H // K, S, D).reshape(B, H, S, D)
