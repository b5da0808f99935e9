"""Self-attention as a module: four projections around one call into the attention op."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from swathe.kernels.attention.api import (
    AttentionSpec,
    Mask,
    attention,
    attention_with_weights,
    resolve_attention,
)
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import AUTO, Choice
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.policy import KernelModule


class SelfAttention(KernelModule):
    """Causal attention with rotary positions and shared key and value heads; HF's names."""

    op: ClassVar[str] = "attn"

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        all_heads = config.num_attention_heads * self.head_dim
        kv_heads = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, all_heads, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads, bias=bias)
        self.o_proj = nn.Linear(all_heads, hidden, bias=bias)
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        return resolve_attention(
            self.q_proj.weight,
            self.head_dim,
            implementation,
            groups=self.groups,
            dropout=self.dropout > 0,
        )

    def forward(
        self,
        hidden_states: Tensor,
        rotation: Rotation,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden), and the weights (B, H, T, S) where they are asked for.

        Raises UnsupportedFeature for weights on a backend other than "eager".
        """
        B, T, _ = hidden_states.shape
        # head counts come from the tensors: a rank of tensor parallelism holds a share of them
        q = self.q_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotation(q, k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions:
            self._refuse_weights()
            spec = AttentionSpec(mask, self.scaling, dropout)
            o, weights = attention_with_weights(q, k, v, spec)
        else:
            o = attention(
                q, k, v, mask, scale=self.scaling, dropout=dropout, implementation=self.choice
            )
        return self.o_proj(o.reshape(B, T, -1)), weights

    def _refuse_weights(self) -> None:
        if self.choice.backend != "eager":
            raise UnsupportedFeature(
                f"output_attentions=True: attention backend {self.choice.backend!r} never forms "
                'the weights; only "eager" does. Call model.set_attn_implementation("eager") first'
            )

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"
