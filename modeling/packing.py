"""Several documents in one row: where each begins, as a Mask that keeps them apart.

    cu_seq_lens_q, cu_seq_lens_k    int (documents + 1,): borders in the only row of a batch of one;
                                    both are the same, each token attends to its own document
    max_length_q, max_length_k      of the longest document, which other libraries' kernels ask for;
                                    taken, since transformers' collator sends them, and not used
    position_ids                    (B or 1, T), without attention_mask and past_key_values: a
                                    document begins wherever they do not go up by one

Cost      borders and positions are looked at once a forward (one host synchronisation), as padding
          is; while torch.compile traces or a graph is captured they are taken as they are.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from swathe.kernels.attention.api import Mask
from swathe.modeling.masks import opaque


class Packing(TypedDict, total=False):
    """What transformers calls FlashAttentionKwargs."""

    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None


def mask_of_borders(packing: Packing, hidden: Tensor) -> Mask | None:
    """The Mask that borders ask for, causal; None where there are none.

    Raises ValueError or TypeError for borders that do not fit `hidden` (1, T, hidden).
    """
    given = {
        "cu_seq_lens_q": packing.get("cu_seq_lens_q"),
        "cu_seq_lens_k": packing.get("cu_seq_lens_k"),
    }
    found = {name: t for name, t in given.items() if t is not None}
    if not found:
        return None
    B, T = hidden.shape[:2]
    for name, borders in found.items():
        if borders.dim() != 1 or len(borders) < 2 or B != 1 or borders.device != hidden.device:
            raise ValueError(
                f"{name} is {tuple(borders.shape)} on {borders.device} for {B} sequences on "
                f"{hidden.device}; it must be (documents + 1,) on the same device, for a batch of "
                "one that holds all documents end to end"
            )
        if borders.is_floating_point() or borders.dtype == torch.bool:
            raise TypeError(f"{name} is {borders.dtype}; it must hold whole numbers (int32)")
    first, *others = found.values()
    if not opaque(first):
        _check_values(first, others[0] if others else first, T)
    return Mask.packed(first, T)


def _check_values(rows: Tensor, keys: Tensor, T: int) -> None:
    values, same = rows.tolist(), rows is keys or torch.equal(rows, keys)
    if not same or values[0] != 0 or values[-1] != T or values != sorted(values):
        raise ValueError(
            f"cu_seq_lens_q is {values}{'' if same else f', cu_seq_lens_k {keys.tolist()}'}; both "
            f"must be the same borders, from 0, never falling, to {T}, the tokens of the row"
        )


def mask_of_positions(position_ids: Tensor) -> Mask | None:
    """The Mask of documents that positions (B or 1, T) tell of, causal; None for a single one."""
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    if not opaque(position_ids) and not bool(begins.any()):
        return None
    row = torch.arange(position_ids.shape[1], device=position_ids.device)
    start = torch.cummax(row * begins, 1).values
    return Mask(causal=True, start=start, rows_may_be_empty=False)


def positions_in(mask: Mask, hidden: Tensor) -> Tensor:
    """Positions (B or 1, T) that count from 0 in each document of a Mask."""
    start: Any = mask.start
    return torch.arange(hidden.shape[1], device=hidden.device) - start
