"""The auxiliary loss that keeps a mixture of experts in balance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing_loss(
    router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """E times the sum over experts of (share of tokens routed there) x (mean probability there).

    It is `top_k` where all experts get the same, and grows with imbalance; layers count together.
    Shapes: router_logits one (N, E) a layer, in the order of B * T tokens; attention_mask (B, T)
    with 1 for real tokens, the others count nowhere. fp32 sums of probabilities in the logits'
    dtype, as HF's load_balancing_loss_func; 0 where no token counts.
    Raises ValueError for shapes that do not fit.
    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
    """
    if not router_logits:
        raise ValueError(
            "router_logits is empty; give the logits of every layer that routes (a model without "
            "such layers has no such loss)"
        )
    first = router_logits[0]
    _check(router_logits, top_k, attention_mask)
    real = None
    if attention_mask is not None:
        real = attention_mask.reshape(-1, 1).to(first.device, torch.float32)
    routed = first.new_zeros(first.shape[1], dtype=torch.float32)
    probability = torch.zeros_like(routed)
    for logits in router_logits:
        weights = F.softmax(logits.to(first.device), dim=-1)
        chosen = torch.topk(weights.detach(), top_k, dim=-1).indices
        weights = weights.float()
        # each expert at most once a token, so nothing is added by index
        counted = torch.zeros_like(weights).scatter_(1, chosen, 1.0)
        if real is not None:
            weights, counted = weights * real, counted * real
        routed = routed + counted.sum(0)
        probability = probability + weights.sum(0)
    rows = len(router_logits) * (real.sum() if real is not None else first.shape[0])
    tokens = torch.as_tensor(rows, dtype=torch.float32, device=first.device).clamp(min=1.0)
    return first.shape[1] * torch.sum((routed / tokens) * (probability / tokens))


def _check(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None) -> None:
    first = router_logits[0]
    for layer, logits in enumerate(router_logits):
        if logits.dim() != 2 or logits.shape != first.shape:
            raise ValueError(
                f"router_logits[{layer}] is {tuple(logits.shape)} and router_logits[0] "
                f"{tuple(first.shape)}; every layer needs the same (tokens, experts)"
            )
    if not 1 <= top_k <= first.shape[1]:
        raise ValueError(f"top_k={top_k}; it must be from 1 to {first.shape[1]}, the experts")
    if mask is not None and (mask.dim() != 2 or mask.numel() != first.shape[0]):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} for {first.shape[0]} tokens; it needs one "
            "entry for each: (B, T) with B * T tokens, 1 for real ones"
        )
