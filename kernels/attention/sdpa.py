"""Attention by torch's own scaled_dot_product_attention, which picks a fused kernel itself.

No mask is formed where full or causal attention over all rows, or a single query, is all that is
asked; a causal block of T rows after S - T cached ones, and padding, need one (T, S) mask for all
layers, because torch aligns `is_causal` with the first key. k and v are never repeated for groups.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.attention.spec import AttentionSpec


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """o (B, T, H, E), a view of torch's result."""
    T, S, mask = q.shape[2], k.shape[2], spec.mask
    grouped = q.shape[1] != k.shape[1]
    if mask.trivial and (not mask.causal or T == 1 or T == S):
        # a comparison of sizes that are traced is no bool
        causal = True if mask.causal and T > 1 else False  # noqa: SIM210
        o = F.scaled_dot_product_attention(
            q, k, v, dropout_p=spec.dropout, is_causal=causal, scale=spec.scale, enable_gqa=grouped
        )
        return o.transpose(1, 2)
    dense = mask.dense(T, S, q.device)
    if dense.is_floating_point():
        dense = dense.to(q.dtype)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, dropout_p=spec.dropout, scale=spec.scale, enable_gqa=grouped
    )
    empty = mask.empty_rows(T, S, q.device)
    return (o if empty is None else o.masked_fill(empty, 0.0)).transpose(1, 2)
