"""Linear layer and cross-entropy in plain PyTorch: the meaning of the op.

    logits[m, v] = sum_k(hidden[m, k] * weight[v, k]) + bias[v]
    loss         = cross_entropy(logits, labels)            as kernels/cross_entropy/eager.py has it

Shapes   hidden: (..., K).  weight: (V, K).  bias: (V,).  labels: (...).  loss: () or labels' shape.
Dtypes   the loss is fp32, fp64 for fp64 input.
Rounding the logits are rounded to hidden's dtype, as HF's lm_head rounds them; with default options
         this is HF's lm_head and ForCausalLMLoss bit for bit. Fused backends do not round them.
Source   transformers.loss.loss_utils.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.losses import LossOptions, eager_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: LossOptions,
    reduction: str,
    num_items: Tensor | float | None,
    chunk_rows: int | None,
) -> Tensor:
    """The loss, by way of all logits at once; differentiable by autograd, fp64-capable."""
    logits = F.linear(hidden, weight, bias)
    return eager_loss(logits, labels, options, reduction, num_items)
