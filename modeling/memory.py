"""How much memory a model takes, from its configuration alone; footprint.py has the formulas."""

from __future__ import annotations

import torch

from swathe.modeling.auto import model_class
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_fields import dtype_named
from swathe.modeling.errors import ConfigError
from swathe.modeling.footprint import MemoryEstimate, footprint
from swathe.modeling.model import PreTrainedModel

__all__ = ["MemoryEstimate", "memory_estimate"]


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
    sizes = (batch_size, sequence_length)
    return footprint(model, *sizes, asked, training, gradient_checkpointing, logits_to_keep)


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
