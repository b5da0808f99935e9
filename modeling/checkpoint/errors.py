"""Errors and warnings about checkpoint files: which file, which key, what fits, how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint was refused before any of it reached a model.

    `code` is stable (E_PATH, E_SAFETENSORS, ...), `file` the file at fault and `key` the tensor or
    JSON key, where there is one.
    """

    def __init__(
        self, code: str, message: str, *, file: Path | None = None, key: str | None = None
    ):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.file = file
        self.key = key


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """The directory, or the weights that should lie in it, do not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointWarning(UserWarning):
    """Something about a checkpoint is odd, but what will be loaded is not in doubt."""


def listing(names: Iterable[str], *, limit: int = LISTED) -> str:
    """`'a', 'b', ... and 3 more`, safe to print whatever the names contain."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} ... and {len(names) - limit} more"
