"""LayerNorm by torch's own fused op, F.layer_norm, which rounds once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """y; the capability record admits no residual and no weights of another dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
