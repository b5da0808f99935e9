"""How far a long run is: a line on stderr for each piece of work, with the time that is left."""

from __future__ import annotations

import sys
import time


class Progress:
    """`step(what)` before each of `total` pieces of work."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = time.monotonic()

    def step(self, what: object) -> None:
        """Say what comes next."""
        self.done += 1
        print(f"[{self.done}/{self.total}{self._times()}] {what}", file=sys.stderr, flush=True)

    def _times(self) -> str:
        spent, before = time.monotonic() - self.start, self.done - 1
        if not before:
            return ""
        left = spent / before * (self.total - before)
        return f", {_in_words(spent)}, about {_in_words(left)} left"


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
