"""Cross-entropy in plain PyTorch: the meaning of the op.

    z[m, v] = softcap * tanh(scale * logits[m, v] / softcap)     z = scale * logits without softcap
    loss[m] = (1 - s) * (lse[m] - z[m, label[m]]) + s * (lse[m] - mean_v(z[m, v])) + z_loss * lse^2

Shapes   logits: (..., V) with any strides.  labels: (...).  loss: () or labels' shape for "none".
Dtypes   fp32 inside and out, fp64 for fp64 logits.
Rounding with scale, softcap, label smoothing and z_loss at their defaults this is HF's
         ForCausalLMLoss bit for bit: logits.float(), then F.cross_entropy.
Source   transformers.loss.loss_utils; Szegedy et al. 2016, arXiv:1512.00567 (label smoothing).
"""

from __future__ import annotations

from torch import Tensor

from swathe.kernels.core.losses import LossOptions, eager_loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    """The loss; differentiable by autograd, fp64-capable, traceable."""
    return eager_loss(logits, labels, options, reduction, num_items)
