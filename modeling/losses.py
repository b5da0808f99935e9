"""Losses of the heads, in fp32 whatever the logits are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each token's prediction of the next: HF's ForCausalLMLoss.

    Shapes: logits (B, T, V), labels (B, T); `shift_labels` are labels already moved by one.
    Rounding: logits are widened to fp32. The mean is over labels other than `ignore_index`, or the
    sum over `num_items_in_batch` (gradient accumulation). With no label left the loss is 0.
    Raises ValueError where shapes do not fit.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(shift_labels.shape)} and logits {tuple(logits.shape)}; labels need "
            f"{tuple(logits.shape[:-1])}, one a token (and logits_to_keep=0)"
        )
    targets = shift_labels.reshape(-1).to(logits.device)
    wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
