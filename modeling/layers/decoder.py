"""A pre-norm decoder layer and the stack of them, on a residual stream kept in two parts.

Between layers the stream is (hidden, residual); its value is their sum. A norm that adds and
normalises in one pass then replaces HF's add followed by a norm, with the same roundings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.layers.mlp import GatedMLP
from swathe.modeling.layers.norm import RMSNorm

Stream = tuple[Tensor, Tensor | None]


class DecoderLayer(nn.Module):
    """norm, attention, norm, MLP; `checkpointing` holds torch.utils.checkpoint's arguments."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer_idx)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing: dict[str, Any] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        rotation: Rotation,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream after this layer, and the attention weights where they are asked for."""
        if residual is None:
            normed, stream = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, stream = self.input_layernorm(hidden_states, residual)
        attended, weights = self.self_attn(normed, rotation, mask, cache, output_attentions)
        normed, stream = self.post_attention_layernorm(attended, stream)
        return self.mlp(normed), stream, weights


def run_layer(layer: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer's forward, recomputed in backward where gradient checkpointing is on."""
    if layer.checkpointing is None or not layer.training:
        return layer(*arguments)
    return checkpoint(layer, *arguments, use_reentrant=False, **layer.checkpointing)
