"""`swathe.generate(model, ...)`: our decoding loop for transformers' own models.

A model of a family that we have is decoded by ours over the same weights (`from_hf`, kept beside
the model for the next call): our kernels, on a CPU the recorded step, and on CUDA a captured one.
Any other language model is decoded by its own forward in the same loop (decoding/stock.py), and its
step is captured where that is found to be the same (decoding/replay.py).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import Tensor

from swathe.modeling.errors import ConfigError
from swathe.modeling.generation.generate import GenerateOutput
from swathe.modeling.hf.decoding.stock import Stock
from swathe.modeling.hf.share import from_hf, generation_config_of, refuse_hooks
from swathe.modeling.model import PreTrainedModel

# ours holds the Parameters of theirs and no reference to it; a Stock holds it weakly
_ours: WeakKeyDictionary[transformers.PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()
_stock: WeakKeyDictionary[transformers.PreTrainedModel, Stock] = WeakKeyDictionary()


def generate(
    model: transformers.PreTrainedModel | PreTrainedModel,
    input_ids: Tensor | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Continue prompts (B, T), greedy or sampled; options and results are those of our `generate`.

    `model` is of either kind; special tokens are its generation_config's, and no other option of
    a file is applied. A transformers model of a family that swathe has, unhooked and without
    adapters, is decoded by swathe's model over the same weights. Any other causal language model
    is decoded by its own forward, as it is: patched, hooked, quantised, with whichever attention
    implementation it has; weights="int8" is not for it.

    On CUDA the cache is "static" unless another is asked for, and the step is captured in a graph
    and replayed. A few tokens are decoded first, once a model, to see that its steps can be: the
    same operators on the same memory every time, no question to the device, and the logits of a
    growing cache. Where they cannot, the same loop runs uncaptured over a growing cache, and a
    UserWarning says why, once; cuda_graph=True raises ValueError instead, cuda_graph=False does
    not try. cache_implementation="static" raises ValueError for such a model on any device.
    `swathe.hf.forget_graphs(model)` frees what is kept for later calls.

    Raises ConfigError for models that decode otherwise: encoder-decoders, those with a `generate`
    of their own or a state that is none of transformers' common caches. Their own `generate`
    serves, with attn_implementation="swathe" and swathe.patch. TypeError for what is no model.
    """
    if isinstance(model, PreTrainedModel):
        return model.generate(input_ids, **options)  # type: ignore[operator]
    chosen = _counterpart(model)
    if chosen is None:
        return _decoder(model).decode(input_ids, **options)
    if model.device.type == "cuda":
        options.setdefault("cache_implementation", "static")
    return chosen.generate(input_ids, **options)  # type: ignore[operator]


def forget_graphs(model: transformers.PreTrainedModel | PreTrainedModel) -> None:
    """Free the graphs that `generate` keeps for a model of either kind, and their caches."""
    if isinstance(model, PreTrainedModel):
        model.forget_graphs()  # type: ignore[operator]
        return
    for found in (_ours.get(model), _stock.get(model)):
        if found is not None:
            found.forget_graphs()  # type: ignore[operator,union-attr]


def _counterpart(model: transformers.PreTrainedModel) -> PreTrainedModel | None:
    """Ours over the Parameters that the model has now, in eval mode; None where there is none."""
    ours = _ours.get(model)
    try:
        if ours is None or not _same(model, ours):
            ours = _ours[model] = from_hf(model).eval()
        refuse_hooks(model)
    except (ConfigError, ValueError):  # its own forward runs what ours would not
        return None
    if model.generation_config is not None:
        ours.generation_config = generation_config_of(model.generation_config)
    return ours


def _decoder(model: transformers.PreTrainedModel) -> Stock:
    found = _stock.get(model)
    if found is None:
        found = _stock[model] = Stock(model)
    if model.generation_config is not None:
        found.generation_config = generation_config_of(model.generation_config)
    return found


def _same(model: Any, ours: PreTrainedModel) -> bool:
    theirs = dict(model.named_parameters(remove_duplicate=False))
    mine = dict(ours.named_parameters(remove_duplicate=False))
    return theirs.keys() == mine.keys() and all(theirs[n] is p for n, p in mine.items())
