"""Every form of attention mask that HF callers pass, as one Mask: a decoder's is always causal.

    (B, S) or (B, T), any dtype of 0 and 1     padding: 1 marks a real token
    (B, 1, 1, S), (B, 1, S)                    the same; floating point without a 1: added to scores
    (B, 1 or H, T, S), (B, T, S)               bool, or integers of 0 and 1: visible where True;
                                               floating point: added to the scores
    Mask                                       taken as it is, causality included

Meaning   causality is never lost: a tensor can only hide more. A mask that does not fit raises with
          both shapes, values that could mean two things raise as well.
Encoders  take the same forms and are not causal; floating point with more than two dimensions is
          always added to the scores there, so that 0 and 1 raise in every such form.
Cost      padding is looked at once a forward: one small host synchronisation, which turns it into
          row intervals or into nothing (all ones). None, a Mask, or a full boolean mask need none.
          While torch.compile traces, or a CUDA graph is captured, nothing can be looked at: padding
          is then taken as a boolean key mask, 0/1 is not verified, and a floating-point mask with
          more than two dimensions is always added to the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swathe.kernels.attention.api import Mask


def causal_mask(given: Tensor | Mask | None, hidden: Tensor, past: int) -> Mask:
    """The Mask of T = hidden.shape[1] new tokens after `past` cached ones.

    Raises ValueError or TypeError for shapes and values outside the table of this module.
    """
    return _mask(given, hidden, past, causal=True)


def bidirectional_mask(given: Tensor | Mask | None, hidden: Tensor) -> Mask:
    """The Mask of an encoder's T = hidden.shape[1] tokens, which all see each other.

    Raises ValueError or TypeError for shapes and values outside the table of this module.
    """
    return _mask(given, hidden, 0, causal=False)


def cross_mask(given: Tensor | Mask | None, hidden: Tensor, S: int) -> Mask:
    """The Mask of a decoder's T = hidden.shape[1] tokens over S states of an encoder.

    Takes (B, S) for padding, and the other forms with T rows; none is causal.
    Raises ValueError or TypeError for shapes and values outside the table of this module.
    """
    if not isinstance(given, Tensor):
        return _mask(given, hidden, 0, causal=False)
    B, T = hidden.shape[:2]
    mask = given.to(hidden.device)
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    rows = (1, T) if mask.dim() == 4 else (B,)
    fits = mask.dim() in (2, 4) and mask.shape[-1] == S and mask.shape[-2] in rows
    if not fits or mask.shape[0] not in (1, B):
        raise ValueError(
            f"encoder_attention_mask has shape {tuple(given.shape)}, but {B} sequences of {T} "
            f"tokens over {S} states of an encoder need ({B}, {S}), ({B}, {T}, {S}), "
            f"({B}, 1, 1, {S}) or ({B}, 1 or heads, {T}, {S})"
        )
    if mask.dim() == 4 and (mask.shape[1:3] != (1, 1) or mask.is_floating_point()):
        return _full(mask, causal=False)
    return _padding(mask.view(-1, S).expand(B, S), T, S, causal=False)


def _mask(given: Tensor | Mask | None, hidden: Tensor, past: int, *, causal: bool) -> Mask:
    if given is None:
        return Mask(causal=causal, rows_may_be_empty=False)
    if isinstance(given, Mask):
        return given
    if not isinstance(given, Tensor):
        raise TypeError(
            f"attention_mask is a {type(given).__name__}; it must be a tensor, a Mask or None. "
            "Use torch.tensor(mask) for nested lists"
        )
    B, T = hidden.shape[:2]
    S = past + T
    mask = given.to(hidden.device)
    if mask.dim() == 2:
        return _padding(_two_dimensional(mask, B, T, S), T, S, causal)
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[-1] != S:
        raise _does_not_fit(mask, B, T, S)
    if mask.shape[1:3] == (1, 1):
        if not causal and mask.is_floating_point():
            return _full(mask, causal)
        return _four_dimensional_padding(mask, B, T, S, causal)
    if mask.shape[2] != T:
        raise _does_not_fit(mask, B, T, S)
    return _full(mask, causal)


def opaque(mask: Tensor) -> bool:
    """Whether values cannot be read here: a trace, a graph capture, or no data at all."""
    return (
        torch.compiler.is_compiling()
        or mask.is_meta
        or mask.numel() == 0
        or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _two_dimensional(mask: Tensor, B: int, T: int, S: int) -> Tensor:
    if mask.shape not in ((B, T), (B, S)):
        raise _does_not_fit(mask, B, T, S)
    if mask.shape[1] == S:
        return mask
    # a mask of the new tokens only: the cached ones are real
    return torch.cat((mask.new_ones(B, S - T), mask), dim=1)


def _four_dimensional_padding(mask: Tensor, B: int, T: int, S: int, causal: bool) -> Mask:
    if mask.is_floating_point() and (opaque(mask) or not _zeros_and_a_one(mask)):
        return Mask(causal=causal, bias=mask)
    return _padding(mask[:, 0, 0].expand(B, S), T, S, causal)


def _full(mask: Tensor, causal: bool) -> Mask:
    if mask.dtype == torch.bool:
        return Mask(causal=causal, allowed=mask)
    if mask.is_floating_point():
        if not opaque(mask) and _zeros_and_a_one(mask):
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} of {mask.dtype} holds only 0 and 1, which "
                "could mean visible or added to the scores; pass mask.bool() for visible, or "
                "0 and -inf to add"
            )
        return Mask(causal=causal, bias=mask)
    if not opaque(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise _not_zero_or_one(mask)
    return Mask(causal=causal, allowed=mask.bool())


def _padding(mask: Tensor, T: int, S: int, causal: bool) -> Mask:
    if opaque(mask):
        return Mask(causal=causal, keys=mask.bool())
    real = mask != 0
    count = real.sum(1)
    start = real.int().argmax(1)
    gaps = (S - real.flip(1).int().argmax(1) - start != count) & (count > 0)
    facts = torch.stack(
        (count.amin(), start.amax(), gaps.any().long(), (real & (mask != 1)).any().long())
    )
    fewest, latest, holes, other = facts.tolist()
    if other:
        raise _not_zero_or_one(mask)
    if fewest == S:
        return Mask(causal=causal, rows_may_be_empty=False)
    empty = fewest == 0 or (causal and latest > S - T)
    if holes:
        return Mask(causal=causal, keys=real, rows_may_be_empty=empty)
    end = start + count
    return Mask(causal=causal, start=start.int(), end=end.int(), rows_may_be_empty=empty)


def _zeros_and_a_one(mask: Tensor) -> bool:
    ones = mask == 1
    return bool((ones.any() & (ones | (mask == 0)).all()).item())


def _not_zero_or_one(mask: Tensor) -> ValueError:
    return ValueError(
        f"attention_mask {tuple(mask.shape)} of {mask.dtype} holds values other than 0 and 1 "
        f"(from {mask.min().item()} to {mask.max().item()}); 1 marks a token to see, 0 one to "
        "hide. A mask to add to the scores must be floating point with four dimensions"
    )


def _does_not_fit(mask: Tensor, B: int, T: int, S: int) -> ValueError:
    two = f"({B}, {S})" if T == S else f"({B}, {S}) or ({B}, {T})"
    return ValueError(
        f"attention_mask has shape {tuple(mask.shape)}, but {B} sequences of {T} new tokens after "
        f"{S - T} cached ones need {two}, ({B}, {T}, {S}), ({B}, 1, 1, {S}) or "
        f"({B}, 1 or heads, {T}, {S})"
    )
