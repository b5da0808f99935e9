"""One model's arguments out of what several processors return.

A tokenizer gives `input_ids` and `attention_mask`, an image processor `pixel_values`, and both may
give a key of the same name. `{**texts, **images}` keeps the last one and says nothing; here that,
a batch of another size and a tensor on another device raise before the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from swathe.modeling.packing import Packing

Conflict = Literal["raise", "first", "last"]
# arguments of a forward whose first axis is not the batch
_WITHOUT_BATCH = {*Packing.__annotations__, "logits_to_keep", "num_items_in_batch"}


class Processor(Protocol):
    """What turns samples of one kind into tensors by argument name: a tokenizer and its like.

    transformers' tokenizers and image processors are such; `functools.partial(tokenizer,
    padding=True)` is one with options.
    """

    def __call__(self, samples: Any, /, *, return_tensors: str) -> Mapping[str, Any]:
        """Arguments for a forward; `return_tensors="pt"` asks for torch tensors."""
        ...


def prepare_inputs(
    *parts: tuple[Processor, Sequence[Any]],
    main: str = "input_ids",
    on_conflict: Conflict = "raise",
) -> dict[str, Any]:
    """Run each processor on its samples and merge: `prepare_inputs((tokenizer, texts), ...)`.

    Raises ValueError where the numbers of samples differ, TypeError for a text in place of a list
    of texts, and what merge_model_inputs raises.
    """
    for _, samples in parts:
        if isinstance(samples, str | bytes):
            raise TypeError(
                f"samples are one {type(samples).__name__}; give a list of samples, even of one"
            )
    counts = [len(samples) for _, samples in parts]
    if len(set(counts)) > 1:
        raise ValueError(
            f"the processors are given {counts} samples; give each as many, in the same order"
        )
    found = (processor(samples, return_tensors="pt") for processor, samples in parts)
    return merge_model_inputs(*found, main=main, on_conflict=on_conflict)


def merge_model_inputs(
    *dicts: Mapping[str, Any], main: str = "input_ids", on_conflict: Conflict = "raise"
) -> dict[str, Any]:
    """All arguments in one dict, for `model(**inputs)`; nothing is copied or moved.

    `main` names the tensor (B, ...) that the others must agree with: the same B and device, and one
    dtype among floating-point tensors but `labels`. One row of `position_ids` serves any batch;
    borders of packed documents, `logits_to_keep` and `num_items_in_batch` have no batch. A key that
    comes twice raises; "first" or "last" chooses instead.
    Raises ValueError naming the key, TypeError for lists and arrays in place of tensors.
    """
    if on_conflict not in get_args(Conflict):
        raise ValueError(f"on_conflict={on_conflict!r}; allowed: {get_args(Conflict)}")
    merged: dict[str, Any] = {}
    home: dict[str, int] = {}
    for i, part in enumerate(dicts):
        for key, value in part.items():
            if key in merged and on_conflict == "raise":
                raise ValueError(
                    f"{key!r} is in inputs {home[key]} and {i}; rename it in one of them, or pass "
                    'on_conflict="first" or "last" to choose'
                )
            if key not in merged or on_conflict == "last":
                merged[key], home[key] = value, i
    _check_tensors(merged, main)
    return merged


def _check_tensors(inputs: Mapping[str, Any], main: str) -> None:
    lead = inputs.get(main)
    if not isinstance(lead, Tensor) or lead.dim() == 0:
        raise ValueError(
            f"main={main!r} must name a tensor (B, ...) among the inputs, which are "
            f"{sorted(inputs)}; pass main= the first argument of the model's forward"
        )
    floating: dict[torch.dtype, str] = {}
    for key, value in inputs.items():
        if isinstance(value, list | tuple) or (
            hasattr(value, "__array__") and not isinstance(value, Tensor)
        ):
            raise TypeError(
                f"{key!r} is a {type(value).__name__}; a model takes tensors: call the processor "
                'with return_tensors="pt", and padding where lengths differ'
            )
        if not isinstance(value, Tensor):
            continue
        if value.dim() and value.device != lead.device:
            raise ValueError(
                f"{key!r} is on {value.device} and {main!r} on {lead.device}; move them to the "
                "model's device"
            )
        if value.is_floating_point() and key != "labels":
            floating.setdefault(value.dtype, key)
        if key not in _WITHOUT_BATCH:
            _check_batch(key, value, main, lead)
    if len(floating) > 1:
        kinds = ", ".join(f"{key!r} is {dtype}" for dtype, key in floating.items())
        raise ValueError(f"{kinds}; cast them all to the model's dtype")


def _check_batch(key: str, value: Tensor, main: str, lead: Tensor) -> None:
    rows = value.shape[0] if value.dim() else None
    if rows != lead.shape[0] and not (key == "position_ids" and rows == 1):
        raise ValueError(
            f"{key!r} is {tuple(value.shape)} and {main!r} {tuple(lead.shape)}; the first axis of "
            f"both is the batch, {lead.shape[0]} here"
        )
