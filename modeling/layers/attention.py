"""Self-attention as a module: four projections around one call into the attention op."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask, resolve_attention
from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.qk_norm_rotary.api import NormCasting
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.layers.capture import Capture, attend
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.layers.head_norm import HeadNorm, NormedRotation
from swathe.modeling.layers.linear import Linear, project
from swathe.modeling.policy import KernelModule


class SelfAttention(KernelModule):
    """Causal attention with rotary positions and shared key and value heads; HF's names.

    Scale, softcap and biases are the configuration's properties (`config.scaling` and so on);
    families with other projections override `make_projections` and `project`.
    """

    op: ClassVar[str] = "attn"

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.softcap = config.scaling, config.attention_softcap
        self.dropout = config.attention_dropout
        self.make_projections(config)
        self.make_extras(config)
        self.choice = self.pick(AUTO)

    def make_projections(self, config: DecoderConfig) -> None:
        """q_proj, k_proj, v_proj and o_proj."""
        assert config.num_key_value_heads is not None
        hidden, (into, out) = config.hidden_size, config.attention_biases
        all_heads = config.num_attention_heads * self.head_dim
        kv_heads = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(hidden, all_heads, bias=into)
        self.k_proj = Linear(hidden, kv_heads, bias=into)
        self.v_proj = Linear(hidden, kv_heads, bias=into)
        self.o_proj = Linear(all_heads, hidden, bias=out)

    def make_extras(self, config: DecoderConfig) -> None:
        """What a family has besides; `sinks` (H,) is one logit a head that takes weight."""
        self.sinks: nn.Parameter | None = None

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        return resolve_attention(
            self.o_proj.weight,
            self.head_dim,
            implementation,
            groups=self.groups,
            dropout=self.dropout > 0,
            softcap=self.softcap is not None,
            sinks=self.sinks is not None,
        )

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, heads * D)."""
        q, k, v = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        return q, k, v

    def turned(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, K, T, D) at their positions."""
        return rotation(q, k)

    def forward(
        self,
        hidden_states: Tensor,
        rotation: Rotation,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        output_attentions: Capture = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden), and the weights (B, H, T, S) where they are asked for.

        Raises UnsupportedFeature for weights that the backend cannot give, see `attend`.
        """
        B, T, _ = hidden_states.shape
        # head counts come from the tensors: a rank of tensor parallelism holds a share of them
        q, k, v = (
            t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.project(hidden_states)
        )
        q, k = self.turned(q, k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        dropout = self.dropout if self.training else 0.0
        how = (mask, self.choice, output_attentions, self.scaling, dropout)
        o, weights = attend(q, k, v, *how, self.softcap, self.sinks)
        return self.o_proj(o.reshape(B, T, -1)), weights

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"


class NormedAttention(SelfAttention):
    """Self-attention whose queries and keys are normed head by head before they are turned."""

    norm_offset: ClassVar[float] = 0.0
    norm_casting: ClassVar[NormCasting] = "llama"

    def make_extras(self, config: DecoderConfig) -> None:
        """The norms' weights, and the one call that applies them."""
        super().make_extras(config)
        self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps, offset=self.norm_offset)
        self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps, offset=self.norm_offset)
        self.normed_rotation = NormedRotation(self.q_norm, self.k_norm, self.norm_casting)

    def turned(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and at their positions."""
        return self.normed_rotation(q, k, rotation)
