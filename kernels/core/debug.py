"""The switch for checks that must read tensors' values, which synchronise with the device.

`with swathe.debug():` or SWATHE_DEBUG=1 in the environment turn them on; results never change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_asked: ContextVar[bool] = ContextVar("swathe_debug", default=False)


def debugging() -> bool:
    """Whether values are to be checked."""
    return _asked.get() or os.environ.get("SWATHE_DEBUG", "0").lower() in ("1", "true", "yes", "on")


@contextmanager
def debug() -> Iterator[None]:
    """Check values within this block: page tables, lengths of caches, borders of documents."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)
