"""Cross-entropy by torch's own op alone: F.cross_entropy on fp32 logits, labels unchecked."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.losses import LossOptions, reduced


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    """The loss; the capability record admits default scale, softcap and z_loss only."""
    losses = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long(),
        ignore_index=options.ignore_index,
        label_smoothing=options.smoothing,
        reduction="none",
    )
    return reduced(losses.view(labels.shape), labels, options.ignore_index, reduction, num_items)
