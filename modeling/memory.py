"""How much memory a model takes: counted where it can be, estimated by a stated formula elsewhere.

With B sequences of S tokens, hidden size h, H query and K key heads of size D, MLP width f (times
the experts a token goes to), vocabulary V, L layers, and e bytes an element:

    parameters    exact   every Parameter once
    gradients     exact   every trainable Parameter once, in its dtype
    optimizer     exact   torch's AdamW: two moments in the parameter's dtype, a step of 4 bytes
    kv_cache      exact   2 L B K S D e, as a DynamicCache holds S tokens given at once; 0 in
                          training. A StaticCache has room for one token more, a DynamicCache that
                          grew up to twice as much
    logits        B S V e, or of the last `logits_to_keep` tokens. In training B S V (2 e + 8): with
                  their gradient, and the loss's log-probabilities and gradient in fp32; 0 where
                  loss_implementation is set, since they are then never formed
    activations   estimate of what training keeps for backward, a layer and token:
                      (4 h + 2 H D + 2 K D + c f) e + 4 H + 8       c = 3 for a gated MLP, else 2
                  norms keep their input and output, attention q, k, v and its output with a
                  log-sum in fp32, an MLP its gate, up and product. Backends that form scores keep
                  B H S^2 more. After the layers 2 h e. With gradient checkpointing, the two parts
                  of each layer's input, (2 L - 1) h e, and everything of the one layer that is
                  being recomputed.
                  Inference holds one layer's largest step: (2 h + max(h + 2 H D + 2 K D, c f)) e

Not in it: the CUDA context and its libraries (0.5 to 1 GB), fragmentation, temporary fp32 copies in
the optimiser's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swathe.modeling.auto import model_class
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_fields import dtype_named
from swathe.modeling.devices import bytes_of
from swathe.modeling.errors import ConfigError
from swathe.modeling.figures import bytes_in_words, count_in_words
from swathe.modeling.model import PreTrainedModel


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; `activations` is what `total` counts, the two others what it would be."""

    title: str
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    kv_cache: int
    logits: int
    activations: int
    activations_kept: int
    activations_recomputed: int

    @property
    def total(self) -> int:
        """The sum of what is needed at once."""
        return sum(size for _, size, _ in self._rows())

    def _rows(self) -> list[tuple[str, int, str]]:
        return [
            ("parameters", self.parameters, "exact"),
            ("buffers", self.buffers, "exact"),
            ("gradients", self.gradients, "exact"),
            ("optimizer", self.optimizer, "exact, AdamW"),
            ("kv_cache", self.kv_cache, "exact"),
            ("logits", self.logits, "estimate" if self.gradients else "exact"),
            ("activations", self.activations, "estimate"),
        ]

    def __str__(self) -> str:
        rows = [row for row in self._rows() if row[1]] + [("total", self.total, "")]
        lines = [f"  {n:<12}{bytes_in_words(size):>10}  {how}".rstrip() for n, size, how in rows]
        if self.gradients:
            lines.append(
                f"  activations are {bytes_in_words(self.activations_kept)} kept, "
                f"{bytes_in_words(self.activations_recomputed)} with gradient checkpointing"
            )
        return "\n".join((self.title, *lines))


def memory_estimate(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    batch_size: int = 1,
    sequence_length: int = 2048,
    dtype: torch.dtype | str | None = None,
    training: bool = False,
    *,
    gradient_checkpointing: bool | None = None,
    logits_to_keep: int = 0,
) -> MemoryEstimate:
    """Bytes that a model needs for `batch_size` sequences of `sequence_length` tokens.

        >>> print(swathe.memory_estimate(config, 4, 4096, "bfloat16", training=True))

    A configuration is built on the meta device, which allocates nothing, as a language model where
    its family has one. `dtype` defaults to the model's, else to the configuration's, else fp32;
    frozen parameters of a model have no gradient. `gradient_checkpointing` defaults to the model's.
    Raises ValueError for sizes below 1, TypeError for anything else than a config or a model.
    """
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if type(size) is not int or size < 1:
            raise ValueError(f"memory_estimate: {name}={size!r} must be a whole number above 0")
    model = _built(config_or_model)
    asked = dtype_named(dtype, "memory_estimate")
    if asked is None and not isinstance(config_or_model, PreTrainedModel):
        asked = config_or_model.dtype or torch.float32
    trained = [p for p in model.parameters() if p.requires_grad] if training else []
    e = (asked or model.dtype).itemsize
    tokens = batch_size * sequence_length
    kept, recomputed, running = (tokens * n for n in _activations(model, e))
    recompute = model.is_gradient_checkpointing
    if gradient_checkpointing is not None:
        recompute = gradient_checkpointing
    return MemoryEstimate(
        title=(
            f"{type(model).__name__}, {count_in_words(model.num_parameters())} parameters, "
            f"{str(asked or model.dtype).removeprefix('torch.')}, {batch_size} x {sequence_length} "
            f"tokens, {'training' if training else 'inference'}"
        ),
        parameters=bytes_of(model.parameters(), asked),
        buffers=bytes_of(model.buffers(), None),
        gradients=bytes_of(trained, asked),
        optimizer=2 * bytes_of(trained, asked) + 4 * len(trained),
        kv_cache=0 if training else _cache(model, tokens, e),
        logits=_logits(model, batch_size, sequence_length, e, training, logits_to_keep),
        activations=(recomputed if recompute else kept) if training else running,
        activations_kept=kept,
        activations_recomputed=recomputed,
    )


def _built(given: object) -> PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        return given
    if not isinstance(given, PreTrainedConfig):
        raise TypeError(
            f"memory_estimate: the first argument is a {type(given).__name__}; it must be a "
            "configuration or a model"
        )
    try:
        found = model_class(given.model_type, "causal_lm")
    except ConfigError:
        found = model_class(given.model_type, "base")
    with torch.device("meta"):
        return found(given)


def _cache(model: PreTrainedModel, tokens: int, e: int) -> int:
    config: Any = model.config
    decodes = hasattr(config, "num_key_value_heads") or getattr(config, "is_decoder", False)
    if not decodes or not config.use_cache:
        return 0
    K, D = _heads(config)
    return 2 * K * D * config.num_hidden_layers * tokens * e


def _heads(config: Any) -> tuple[int, int]:
    """Key heads of a layer and their size, which are no fields of BERT's configuration."""
    H = config.num_attention_heads
    K = getattr(config, "num_key_value_heads", None) or H
    return K, getattr(config, "head_dim", None) or config.hidden_size // H


def _logits(
    model: PreTrainedModel, batch: int, length: int, e: int, training: bool, keep: int
) -> int:
    head: Any = model.get_output_embeddings()
    if head is None:
        return 0
    vocabulary: int = head.weight.shape[0]
    if not training:
        return batch * min(keep or length, length) * vocabulary * e
    fused = model.config.loss_implementation is not None
    return 0 if fused else batch * length * vocabulary * (2 * e + 8)


def _activations(model: PreTrainedModel, e: int) -> tuple[int, int, int]:
    """Bytes a token: kept in training, kept with checkpointing, and held in inference."""
    config: Any = model.config
    h, layers, H = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    K, D = _heads(config)
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None) if experts else None
    f = (width or config.intermediate_size) * (experts or 1)
    c = 3 if any(_is_gated(m) for m in model.modules()) else 2
    layer = (4 * h + 2 * H * D + 2 * K * D + c * f) * e + 4 * H + 8
    after = 2 * h * e
    held = (2 * h + max(h + 2 * H * D + 2 * K * D, c * f)) * e
    return layers * layer + after, (2 * layers - 1) * h * e + layer + after, held


def _is_gated(module: nn.Module) -> bool:
    names = dict(module.named_children()) | dict(module.named_parameters(recurse=False))
    return any(name in names for name in ("gate_proj", "gate_up_proj"))
