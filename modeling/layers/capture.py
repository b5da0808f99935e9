"""One call of attention, and its weights where a forward was asked for them.

Only "eager" forms the weights on its way. Under `config.attn_capture = "recompute"` every backend
gives its own output, and "eager" forms the weights beside it in a second pass: without dropout, and
with all that they cost in memory, so this is for looking into a model, not for training one.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from swathe.kernels.attention.api import AttentionSpec, Mask, attention, attention_with_weights
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import Choice

Capture = bool | Literal["recompute"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    choice: Choice,
    capture: Capture,
    scale: float,
    dropout: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o (B, T, H, E), and the weights (B, H, T, S) where `capture` asks for them.

    Raises UnsupportedFeature for `capture=True` on a backend other than "eager".
    """
    if capture and choice.backend == "eager":
        return attention_with_weights(
            q, k, v, AttentionSpec(mask, scale, dropout, softcap, sinks=sinks)
        )
    if capture is True:
        raise UnsupportedFeature(
            f"output_attentions=True: attention backend {choice.backend!r} never forms the "
            'weights; only "eager" does. Call model.set_attn_implementation("eager") first, or set '
            'model.config.attn_capture = "recompute" to form them in a second pass, for debugging'
        )
    o = attention(
        q,
        k,
        v,
        mask,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        sinks=sinks,
        implementation=choice,
    )
    if not capture:
        return o, None
    without_dropout = AttentionSpec(mask, scale, 0.0, softcap, sinks=sinks)
    return o, attention_with_weights(q, k, v, without_dropout)[1]
