"""`swathe.generate(model, ...)`: our decoding loop for transformers' own models.

A model of a family that we have is decoded by ours over the same weights (`from_hf`, kept beside
the model for the next call): our kernels, on a CPU the recorded step, and on CUDA a captured one.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import Tensor

from swathe.modeling.generation.generate import GenerateOutput
from swathe.modeling.hf.share import from_hf, generation_config_of
from swathe.modeling.model import PreTrainedModel

# ours holds the Parameters of theirs and no reference to it
_ours: WeakKeyDictionary[transformers.PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


def generate(
    model: transformers.PreTrainedModel | PreTrainedModel,
    input_ids: Tensor | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Continue prompts (B, T), greedy or sampled; options and results are those of our `generate`.

    `model` is of either kind; special tokens are its generation_config's. On CUDA the cache is
    "static" unless another is asked for, so that the step is captured in a graph and replayed.
    Raises what `from_hf` raises where we have no such model: its own `generate` serves then, with
    attn_implementation="swathe" and swathe.patch.
    """
    if isinstance(model, PreTrainedModel):
        return model.generate(input_ids, **options)  # type: ignore[operator]
    ours = _counterpart(model)
    if model.device.type == "cuda":
        options.setdefault("cache_implementation", "static")
    return ours.generate(input_ids, **options)  # type: ignore[operator]


def _counterpart(model: transformers.PreTrainedModel) -> PreTrainedModel:
    """Ours over the Parameters that the model has now, in eval mode."""
    ours = _ours.get(model)
    if ours is None or not _same(model, ours):
        ours = _ours[model] = from_hf(model).eval()
    if model.generation_config is not None:
        ours.generation_config = generation_config_of(model.generation_config)
    return ours


def _same(model: Any, ours: PreTrainedModel) -> bool:
    theirs = dict(model.named_parameters(remove_duplicate=False))
    mine = dict(ours.named_parameters(remove_duplicate=False))
    return theirs.keys() == mine.keys() and all(theirs[n] is p for n, p in mine.items())
