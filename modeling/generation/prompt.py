"""What `generate` starts from: a checked prompt, its padding moved left, and the special tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`ends` are the tokens that end a row, `pad` fills ended rows.

    `named_pad` is the padding token that the call or a config named; `pad` may be an EOS instead.
    """

    ends: tuple[int, ...]
    pad: int | None
    named_pad: int | None
    bos: int | None

    @classmethod
    def of(cls, model: Any, eos: int | Sequence[int] | None, pad: int | None) -> SpecialTokens:
        """The call's tokens, else generation_config's, else config's.

        Raises ValueError for ids in the call that the model does not have; in a config, where hub
        files say -1 for "none", such ids are passed over.
        """
        vocab = getattr(model.config, "vocab_size", None)

        def legal(value: Any) -> bool:
            return type(value) is int and value >= 0 and (vocab is None or value < vocab)

        def default(name: str) -> list[int]:
            for config in (getattr(model, "generation_config", None), model.config):
                found = [token for token in _listed(getattr(config, name, None)) if legal(token)]
                if found:
                    return found
            return []

        for name, given in (("eos_token_id", eos), ("pad_token_id", pad)):
            for value in _listed(given):
                if not legal(value):
                    raise ValueError(
                        f"{name} is {value!r}; token ids of this model are whole numbers from 0 "
                        f"to {'its vocabulary size' if vocab is None else vocab - 1}"
                    )
        ends = default("eos_token_id") if eos is None else _listed(eos)
        pads = default("pad_token_id") if pad is None else [pad]
        return cls(
            tuple(ends),
            (pads or ends or [None])[0],
            pads[0] if pads else None,
            next(iter(default("bos_token_id")), None),
        )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` (B, T) int64, every row ending in a token; `given` (B, T), the caller's own order.

    `mask` (B, T) int64 of 0 and 1 belongs to `ids`; None when nothing is padding. `holes`: some of
    it lies between tokens. Every `times` rows are equal.
    """

    ids: Tensor
    mask: Tensor | None
    given: Tensor
    times: int = 1
    holes: bool = False

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None = None, holes: bool = False) -> Prompt:
        """A prompt to use as it is, which has no padding on the right."""
        return cls(ids, mask, ids, holes=holes)

    @classmethod
    def moved_left(cls, ids: Tensor, mask: Tensor) -> Prompt:
        """The prompt with each row's padding moved before its tokens, wherever it stood."""
        order = mask.argsort(dim=1, stable=True)
        return cls(ids.gather(1, order), mask.gather(1, order), ids)

    def repeated(self, times: int) -> Prompt:
        """Every row `times` times, one after another."""
        if times == 1:
            return self
        ids, given = (t.repeat_interleave(times, 0) for t in (self.ids, self.given))
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Prompt(ids, mask, given, times, self.holes)

    def distinct(self) -> Prompt:
        """Every row once."""
        mask = None if self.mask is None else self.mask[:: self.times]
        return Prompt(self.ids[:: self.times], mask, self.given[:: self.times], 1, self.holes)


def read_prompt(model: Any, ids: Any, mask: Tensor | None, special: SpecialTokens) -> Prompt:
    """Check a prompt and its mask. Raises TypeError and ValueError, naming the argument."""
    ids = _ids(model, ids)
    if mask is None:
        _warn_of_unmasked_padding(ids, special)
        return Prompt.of(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}; it needs the shape of input_ids, {tuple(ids.shape)}, with "
            "1 on tokens and 0 on padding"
        )
    mask = mask.to(ids.device)
    real = mask == 1
    holes = (real[:, :-1] & ~real[:, 1:]).any()
    facts = ((real | (mask == 0)).all(), real.all(), real.any(1).all(), real[:, -1].all(), holes)
    legal, full, no_row_empty, ends_in_tokens, with_holes = torch.stack(facts).tolist()
    if not legal:
        raise ValueError("attention_mask holds values other than 0 and 1; 1 marks a token to read")
    if full:
        return Prompt.of(ids)
    counts = real.sum(1)
    if not no_row_empty:
        raise ValueError(
            f"attention_mask is 0 on all of row {counts.tolist().index(0)}; a row needs at least "
            "one token to continue, such as the tokenizer's bos_token_id"
        )
    if special.pad is None and ids.shape[0] > 1 and bool((counts != counts[0]).any()):
        raise ValueError(
            "the rows of attention_mask have unequal padding, and neither the call nor the model's "
            "configs name a pad_token_id or eos_token_id; pass pad_token_id"
        )
    if not ends_in_tokens:
        return Prompt.moved_left(ids, real.long())
    return Prompt.of(ids, real.long(), with_holes)


def _ids(model: Any, ids: Any) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"input_ids is a {type(ids).__name__}; it must be an integer tensor (batch, tokens), "
            'such as tokenizer(text, return_tensors="pt").input_ids'
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {ids.dtype}; token ids are int64 or int32: use .long()")
    if ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}; it must be (batch, tokens). "
            "Use input_ids[None] for one sequence"
        )
    if not ids.numel():
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}, an empty prompt; start with at least one "
            "token, such as the tokenizer's bos_token_id"
        )
    device = next(model.parameters()).device
    if ids.device != device:
        raise ValueError(
            f"input_ids is on {ids.device}, the model on {device}; move one of them with .to"
        )
    vocab = getattr(model.config, "vocab_size", None)
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or (vocab is not None and high >= vocab):
        raise ValueError(
            f"input_ids holds ids from {low} to {high}; the model's vocabulary has ids from 0 to "
            f"{'?' if vocab is None else vocab - 1}: use the tokenizer that belongs to it"
        )
    return ids.long()


def _warn_of_unmasked_padding(ids: Tensor, special: SpecialTokens) -> None:
    pad = special.named_pad
    if pad is None:
        return
    # a prompt may hold BOS or EOS on purpose; at an end of a row EOS is more likely padding
    suspects = ids if pad not in (special.bos, *special.ends) else ids[:, [0, -1]]
    if pad != special.bos and bool((suspects == pad).any()):
        warnings.warn(
            f"input_ids holds the padding token {pad}, but no attention_mask was given, so padding "
            "is read as text; pass the tokenizer's attention_mask (or all ones, if it is text)",
            stacklevel=4,
        )
