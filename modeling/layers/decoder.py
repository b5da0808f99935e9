"""A pre-norm decoder layer and the stack of them, on a residual stream kept in two parts.

Between layers the stream is (hidden, residual); its value is their sum. A norm that adds and
normalises in one pass then replaces HF's add followed by a norm, with the same roundings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.layers.attention import SelfAttention
from swathe.modeling.layers.capture import Capture
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.layers.mlp import GatedMLP
from swathe.modeling.layers.norm import RMSNorm

LayerOutput = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class DecoderLayer(nn.Module):
    """norm, attention, norm, MLP; `checkpointing` holds the arguments of gradients.run_layer.

    `layer_type` and `window` say which rotation and which mask of a forward the layer takes.
    """

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_type, self.window = config.layer_type(layer_idx), config.window(layer_idx)
        self.self_attn = self.make_attention(config, layer_idx)
        self.mlp = self.make_mlp(config, layer_idx)
        self.input_layernorm = self.make_norm(config)
        self.post_attention_layernorm = self.make_norm(config)
        self.checkpointing: dict[str, Any] | None = None

    @staticmethod
    def make_attention(config: DecoderConfig, layer_idx: int) -> SelfAttention:
        """The layer's attention."""
        return SelfAttention(config, layer_idx)

    @staticmethod
    def make_mlp(config: DecoderConfig, layer_idx: int) -> nn.Module:
        """The layer's MLP."""
        return GatedMLP(
            config.hidden_size, config.intermediate_size, config.activation, config.mlp_biases
        )

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """A norm over the hidden size; the model's last one is made here as well."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        rotation: Rotation,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        output_attentions: Capture = False,
    ) -> LayerOutput:
        """The stream after this layer, attention weights where asked for, and router logits."""
        if residual is None:
            normed, stream = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, stream = self.input_layernorm(hidden_states, residual)
        attended, weights = self.self_attn(normed, rotation, mask, cache, output_attentions)
        normed, stream = self.add(attended, stream)
        out, routed = self.feed_forward(normed)
        return self.finish(out), stream, weights, routed

    def add(self, attended: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's output on the stream: what the MLP reads, and the stream."""
        return self.post_attention_layernorm(attended, stream)

    def feed_forward(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP's output, and where it is a mixture of experts its router's logits."""
        return self.mlp(normed), None

    def finish(self, out: Tensor) -> Tensor:
        """The MLP's output as it goes onto the stream."""
        return out


class SandwichLayer(DecoderLayer):
    """Gemma 2 and 3: what attention and MLP return is normed as well, before it is added."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.pre_feedforward_layernorm = self.make_norm(config)
        self.post_feedforward_layernorm = self.make_norm(config)

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Gemma's: 1 + weight, rounded once."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0, casting="gemma")

    def add(self, attended: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's output, normed, on the stream: what the MLP reads, and the stream."""
        return self.pre_feedforward_layernorm(self.post_attention_layernorm(attended), stream)

    def finish(self, out: Tensor) -> Tensor:
        """The MLP's output, normed."""
        return self.post_feedforward_layernorm(out)
