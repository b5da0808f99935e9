"""What an out-of-memory error in a forward is told: where the memory goes, and what takes less.

The error stays what it was raised as. The text is a note on it (PEP 678), which tracebacks print
below the message; `error.__notes__` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swathe.modeling.figures import bytes_in_words
from swathe.modeling.footprint import MemoryEstimate, footprint
from swathe.modeling.policy import kernel_modules

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

_BEGINS = "Out of memory in "
# what the formulas of footprint.py read; a configuration of one's own may have others
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def explain(
    model: PreTrainedModel, error: BaseException, args: Sequence[Any], given: Mapping[str, Any]
) -> None:
    """Put the note on an error that `model(*args, **given)` raised, in place of its body's."""
    notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith(_BEGINS)]
    error.__notes__ = [*notes, advice(model, args, given)]


def advice(model: PreTrainedModel, args: Sequence[Any], given: Mapping[str, Any]) -> str:
    """The estimate for these inputs, and a line for each change that would make it smaller."""
    shape = _batch_and_length(model, args, given)
    if shape is None or not all(hasattr(model.config, size) for size in _SIZES):
        return f"{_BEGINS}{type(model).__name__}.forward"
    keep = given.get("logits_to_keep", 0)
    keep = keep.numel() if isinstance(keep, Tensor) else keep
    # what autograd records is kept, whatever mode the model is in
    recorded = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    estimate = footprint(model, *shape, training=recorded, logits_to_keep=keep)
    cache = given.get("past_key_values")
    if cache is not None and not recorded:
        batch, length = shape
        # layers that ran before the error have put the new tokens there already
        held = footprint(model, batch, max(length, cache.get_seq_length())).kv_cache
        estimate = replace(estimate, kv_cache=held)
    lines = _ways_out(model, estimate, shape, keep)
    return "\n".join((f"{_BEGINS}{estimate}", "What takes less:", *(f"  {x}" for x in lines)))


def _batch_and_length(
    model: PreTrainedModel, args: Sequence[Any], given: Mapping[str, Any]
) -> tuple[int, int] | None:
    main = args[0] if args else given.get(model.main_input_name)
    main = given.get("inputs_embeds") if main is None else main
    if not isinstance(main, Tensor) or main.dim() < 2 or 0 in main.shape[:2]:
        return None
    batch, length = main.shape[:2]
    return batch, length


def _ways_out(
    model: PreTrainedModel, estimate: MemoryEstimate, shape: tuple[int, int], keep: int
) -> list[str]:
    batch, length = shape
    recorded, lines = estimate.gradients > 0, []
    fewer = replace(estimate, activations=estimate.activations_recomputed)
    if recorded and not model.training:
        lines.append("call it under torch.no_grad(), unless you want gradients: nothing is kept")
    elif recorded and model.supports_gradient_checkpointing and fewer.total < estimate.total:
        lines.append(
            "model.gradient_checkpointing_enable(): activations "
            f"{bytes_in_words(estimate.activations)} -> {bytes_in_words(fewer.activations)}"
        )
    scores = _scores(model, batch, length, recorded)
    if scores:
        lines.append(
            'model.set_attn_implementation("auto"): "eager" forms scores, '
            f"{bytes_in_words(scores)} beside the estimate"
        )
    if estimate.logits and recorded and model.training:
        lines.append(
            'model.config.loss_implementation = "auto" in training: logits '
            f"{bytes_in_words(estimate.logits)} -> 0 B"
        )
    elif estimate.logits and not recorded and keep == 0 and length > 1:
        last = estimate.logits // length
        lines.append(
            "logits_to_keep=1, where only the next token is wanted: logits "
            f"{bytes_in_words(estimate.logits)} -> {bytes_in_words(last)}"
        )
    if model.dtype.itemsize > 2:
        lines.append("model.to(torch.bfloat16): half of everything but buffers")
    if batch > 1:
        lines.append(f"fewer than {batch} sequences at a time: activations and logits likewise")
    lines.append('from_pretrained(..., device_map="auto"): layers that do not fit go elsewhere')
    return lines


def _scores(model: PreTrainedModel, batch: int, length: int, recorded: bool) -> int:
    """Bytes of the scores that layers on "eager" form; of one layer where nothing is kept."""
    eager = [m for _, m in kernel_modules(model) if m.op == "attn" and m.choice.backend == "eager"]
    config: Any = model.config
    one = batch * config.num_attention_heads * length * length * model.dtype.itemsize
    return one * (len(eager) if recorded else min(len(eager), 1))
