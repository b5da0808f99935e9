"""Compiling needs a process in which nothing is interpreted."""

from __future__ import annotations

import pytest

from swathe.kernels.core.device import interpreting


def pytest_collection_modifyitems() -> None:
    if interpreting():
        raise pytest.UsageError("tests/offline compiles; run it without TRITON_INTERPRET")
