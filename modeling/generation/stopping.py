"""Stop strings: a row ends once the text of its new tokens contains one of them.

Text is looked at on the host, so a call with stop strings waits for the device at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# decoding from the middle may change so many characters at the cut: a lost space, half a character
CUT = 8


class Decoder(Protocol):
    """What is needed of a tokenizer; transformers' and the tokenizers library's have it."""

    def decode(self, token_ids: list[int], /) -> str:
        """The text of some tokens."""
        ...


class StopStrings:
    """The text of every row's new tokens, as far back as a stop string may reach."""

    def __init__(self, strings: list[str], tokenizer: Decoder, rows: int):
        self.strings, self.tokenizer = strings, tokenizer
        self.reach = max(map(len, strings)) + CUT
        self.tails: list[list[int]] = [[] for _ in range(rows)]

    @classmethod
    def of(
        cls,
        strings: str | Sequence[str] | None,
        tokenizer: Decoder | None,
        rows: int,
        pad: int | None,
    ) -> StopStrings | None:
        """None where nothing is given. Raises TypeError and ValueError for what cannot be used."""
        if strings is None:
            if tokenizer is not None:
                raise ValueError(
                    "tokenizer serves only to find stop_strings, and none are given; pass "
                    "stop_strings or leave tokenizer out"
                )
            return None
        found = [strings] if isinstance(strings, str) else list(strings)
        if not found or not all(isinstance(string, str) and string for string in found):
            raise ValueError(
                f"stop_strings is {strings!r}; give a string or a list of strings, none of them "
                "empty, or None"
            )
        if not hasattr(tokenizer, "decode"):
            raise TypeError(
                f"stop_strings are found in text, and tokenizer is a {type(tokenizer).__name__}; "
                "pass the model's tokenizer, an object with decode(token_ids)"
            )
        if rows > 1 and pad is None:
            raise ValueError(
                "stop_strings end rows at different steps, and neither the call nor the model's "
                "configs name a pad_token_id or eos_token_id to fill them with; pass pad_token_id"
            )
        assert tokenizer is not None
        return cls(found, tokenizer, rows)

    def met(self, token: Tensor, ended: Tensor) -> Tensor:
        """Which rows (B,) a new token (B,) completes a stop string in; ended rows are passed by."""
        pairs = torch.stack((token, ended.to(token.dtype)), 1).tolist()
        found = [not over and self._completes(row, t) for row, (t, over) in enumerate(pairs)]
        return torch.tensor(found, device=token.device)

    def _completes(self, row: int, token: int) -> bool:
        tail = self.tails[row]
        tail.append(token)
        text = self.tokenizer.decode(tail)
        if any(string in text for string in self.strings):
            return True
        if len(text) > 4 * self.reach:
            # what is too far back for a string that ends in a later token is not decoded again
            later = tail[len(tail) // 2 :]
            if len(self.tokenizer.decode(later)) >= 2 * self.reach:
                self.tails[row] = later
        return False
