"""A one-line progress bar on stderr for work that takes longer than a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

DELAY_S = 1.0
INTERVAL_S = 0.1
WIDTH = 30


class Progress:
    """Counts bytes towards `total`; silent when stderr is no terminal."""

    def __init__(self, what: str, total: int, *, enabled: bool = True):
        self.what = what
        self.total = total
        self.done = 0
        self.stream: TextIO | None = sys.stderr
        self.enabled = enabled and self.stream is not None and self.stream.isatty()
        self.next_draw = time.monotonic() + DELAY_S
        self.drawn = False

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.enabled and time.monotonic() >= self.next_draw:
            self._draw()
            self.next_draw = time.monotonic() + INTERVAL_S

    def _draw(self) -> None:
        fraction = self.done / self.total if self.total else 1.0
        bar = "#" * round(WIDTH * fraction)
        print(
            f"\r{self.what} [{bar:<{WIDTH}}] {fraction:4.0%} of {self.total / 1e6:.0f} MB",
            end="",
            file=self.stream,
            flush=True,
        )
        self.drawn = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.drawn:
            if kind is None:
                self._draw()
            print(file=self.stream)
