"""Text while it is being generated, in whole characters, from any tokenizer that can decode."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO

from torch import Tensor

UNFINISHED = "\ufffd"  # what decoders print for bytes that are not yet a character
CONTEXT = 8


class Streamer(Protocol):
    """What `generate` calls; transformers' TextStreamer fits as well."""

    def put(self, value: Tensor) -> None:
        """Token ids on the CPU: first the prompt (B, T), then each step's (B,)."""

    def end(self) -> None:
        """No more tokens come."""


class TextStreamer:
    """Prints one sequence to `file` (stdout) as it grows; `end` adds a new line.

    Each new token is decoded together with the few before it, so that a tokenizer's spacing
    between tokens is right, and is held back while it ends inside a character.
    `decode_kwargs` go to `tokenizer.decode`, for example skip_special_tokens=True.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        skip_prompt: bool = False,
        file: TextIO | None = None,
        **decode_kwargs: Any,
    ):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.file = file
        self.decode_kwargs = decode_kwargs
        self._restart()

    def _restart(self) -> None:
        self.ids: list[int] = []
        self.printed = 0  # ids[:printed] are on the screen, or a prompt that is skipped
        self.at_prompt = True

    def put(self, value: Tensor) -> None:
        """Print what the new ids complete. Raises ValueError for more than one sequence."""
        if value.dim() == 2 and value.shape[0] == 1:
            value = value[0]
        if value.dim() != 1 or (not self.at_prompt and value.shape[0] != 1):
            raise ValueError(
                f"TextStreamer got ids of shape {tuple(value.shape)}; it prints one sequence, so "
                "generate with a batch of 1, or pass your own streamer with put and end"
            )
        self.ids += value.tolist()
        if self.at_prompt and self.skip_prompt:
            self.printed = len(self.ids)
        self.at_prompt = False
        self._print_new()

    def end(self) -> None:
        """Print what was held back and a new line; the streamer can then be used again."""
        self._print_new(final=True)
        print(file=self.file or sys.stdout, flush=True)
        self._restart()

    def _print_new(self, *, final: bool = False) -> None:
        start = max(0, self.printed - CONTEXT)
        context = self._decode(self.ids[start : self.printed])
        text = self._decode(self.ids[start:])
        new = text[len(context) :]
        if not new or (new.endswith(UNFINISHED) and not final):
            return
        print(new, end="", file=self.file or sys.stdout, flush=True)
        self.printed = len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, **self.decode_kwargs)) if ids else ""
