"""BERT's attention: over the tokens of a text, and in a decoder over the states of an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from swathe.kernels.attention.api import Mask, resolve_attention
from swathe.kernels.core.registry import AUTO, Choice
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cross_cache import EncoderDecoderCache
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.layers.capture import Capture, attend
from swathe.modeling.layers.layer_norm import LayerNorm
from swathe.modeling.policy import KernelModule


@dataclass(frozen=True)
class Source:
    """What cross-attention reads: an encoder's states (B, S, hidden), of which `mask` hides some.

    A layer whose keys and values of them are in `cache` takes those; then states may be None.
    """

    states: Tensor | None
    mask: Mask
    cache: EncoderDecoderCache | None = None


class BertHeads(KernelModule):
    """Three projections and one call into the attention op, which both kinds of attention are."""

    op: ClassVar[str] = "attn"

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_idx = layer_idx
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        weight, dropout = self.query.weight, self.dropout > 0
        return resolve_attention(weight, self.head_dim, implementation, dropout=dropout)

    def heads(self, projected: Tensor) -> Tensor:
        """(B, T, hidden) as (B, H, T, D)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, D) of states (B, S, hidden)."""
        return self.heads(self.key(states)), self.heads(self.value(states))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, output_attentions: Capture
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden), and the weights (B, H, T, S) where they are asked for.

        Raises UnsupportedFeature for weights that the backend cannot give, see layers/capture.py.
        """
        dropout = self.dropout if self.training else 0.0
        o, weights = attend(q, k, v, mask, self.choice, output_attentions, self.scaling, dropout)
        return o.flatten(2), weights

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"


class BertSelfAttention(BertHeads):
    """Attention over the tokens themselves, a decoder's earlier ones among them."""

    def biased(self, mask: Mask, q: Tensor, k: Tensor) -> Mask:
        """The mask, with what is to be added to the scores: nothing here; see the DummyBert."""
        return mask

    def forward(
        self,
        hidden: Tensor,
        mask: Mask,
        cache: DynamicCache | StaticCache | None = None,
        output_attentions: Capture = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden) and weights (B, H, T, S), as `attend`."""
        q = self.heads(self.query(hidden))
        k, v = self.keys_and_values(hidden)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.attend(q, k, v, self.biased(mask, q, k), output_attentions)


class BertCrossAttention(BertHeads):
    """Attention over the states of an encoder, whose keys and values are made once a cache."""

    def forward(
        self, hidden: Tensor, source: Source, output_attentions: Capture = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, hidden) and weights (B, H, T, S), as `attend`."""
        q, cache = self.heads(self.query(hidden)), source.cache
        if cache is not None and cache.is_updated.get(self.layer_idx):
            k = v = q[:, :, :0]  # nothing to add to what is there
        else:
            assert source.states is not None
            k, v = self.keys_and_values(source.states)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return self.attend(q, k, v, source.mask, output_attentions)


class BertOutput(nn.Module):
    """Projection, dropout, and the norm of the sum with what came in."""

    def __init__(self, config: BertConfig, size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(B, T, hidden) of hidden (B, T, size) and residual (B, T, hidden)."""
        return self.LayerNorm(self.dropout(self.dense(hidden)), residual)[0]


class BertAttention(nn.Module):
    """Attention of either kind and its output; the inner module is called `self` in checkpoints."""

    def __init__(self, config: BertConfig, inner: BertHeads) -> None:
        super().__init__()
        self.self = inner
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """The normed sum (B, T, hidden), and the weights; arguments as the inner module's."""
        attended, weights = self.self(hidden, *arguments)
        return self.output(attended, hidden), weights
