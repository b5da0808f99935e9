"""Errors that a user can act on: what was given, what is allowed, how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnsupportedFeature(ValueError):
    """A backend was named that cannot serve what was asked; the message lists every reason."""


class BackendUnavailable(RuntimeError):
    """A backend was named that this installation cannot run; the message says what is missing."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when one of `allowed` is close to `given`, else an empty string."""
    close = get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
