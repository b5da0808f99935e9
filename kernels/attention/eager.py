"""Attention in plain PyTorch: the meaning of the op.

    o[b, t, h, d] = sum_s p[b, h, t, s] * v[b, h // G, s, d]     G = H / K, p as in spec.py

Shapes   q: (B, H, T, D).  k: (B, K, S, D).  v: (B, K, S, E).  o: (B, T, H, E).  lse: (B, H, T).
Dtypes   any floating point, fp64 included; q, k and v alike.
Rounding HF's, bit for bit for Llama: scores, scaled, capped and biased scores are each rounded to
         q's dtype, the softmax (with the sink) is fp32, fp64 for fp64, rounded to q's dtype; then
         the product with v.
Masks    hidden keys get weight exactly 0; a row that sees no key gives 0 and passes no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.attention.spec import AttentionSpec


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> Tensor | tuple[Tensor, Tensor]:
    """o, or (o, lse); differentiable by autograd and traceable."""
    o, _, lse = _attend(q, k, v, spec)
    return o if lse is None else (o, lse)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """o, and the weights p (B, H, T, S) after dropout."""
    return _attend(q, k, v, spec)[:2]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    k, v = spec.gathered(k), spec.gathered(v)
    H, T, S, mask = q.shape[1], q.shape[2], k.shape[2], spec.mask
    k, v = expand_heads(k, H), expand_heads(v, H)
    z = scores(q, k, spec)
    hidden = None
    if not (mask.trivial and (T == 1 or not mask.causal)):
        hidden = ~mask.visible(T, S, q.device)
        z = z.masked_fill(hidden, torch.finfo(z.dtype).min)
    wide = z.to(torch.promote_types(q.dtype, torch.float32))
    if spec.sinks is not None:
        sinks = spec.sinks.to(wide.dtype).view(1, -1, 1, 1)
        wide = torch.cat((wide, sinks.expand(*wide.shape[:-1], 1)), -1)
    weights = torch.softmax(wide, dim=-1)[..., :S].to(q.dtype)
    if hidden is not None and mask.rows_may_be_empty:
        # exact zeros already, but for rows that see no key at all
        weights = weights.masked_fill(hidden, 0.0)
    weights = F.dropout(weights, spec.dropout, training=spec.dropout > 0)
    lse = _log_sum(wide, hidden) if spec.lse else None
    return torch.matmul(weights, v).transpose(1, 2), weights, lse


def scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """z (B, H, T, S) of keys (B, H, S, D), rounded to q's dtype after every step."""
    z = torch.matmul(q, k.transpose(2, 3)) * spec.scale
    if spec.softcap is not None:
        z = torch.tanh(z / spec.softcap) * spec.softcap
    T, S = z.shape[2:]
    if spec.alibi is not None:
        distance = (
            torch.arange(S, device=q.device) - spec.mask.rows(T, S, q.device)[:, None, :, None]
        )
        # fp64 scores take slopes as they are, not products that fp32 rounded
        slopes = spec.alibi.to(torch.promote_types(spec.alibi.dtype, z.dtype))
        slopes = slopes.view(-1, q.shape[1], 1, 1)
        z = z + (slopes * distance).to(z.dtype)
    if spec.mask.bias is not None:
        z = z + spec.mask.bias.to(z.dtype)
    return z


def _log_sum(wide: Tensor, hidden: Tensor | None) -> Tensor:
    """lse of scores that may carry a sink in a last column of their own."""
    if hidden is not None:
        hidden = F.pad(hidden, (0, wide.shape[-1] - hidden.shape[-1]))
        wide = wide.masked_fill(hidden, float("-inf"))
    return torch.logsumexp(wide, -1)


def expand_heads(t: Tensor, H: int) -> Tensor:
    """Keys or values (B, K, S, D), repeated for each query head of their group."""
    B, K, S, D = t.shape
    return t if K == H else t[:, :, None].expand(B, K, H // K, S, D).reshape(B, H, S, D)
