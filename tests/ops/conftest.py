"""Ops run with poisoned memory: what a kernel leaves unwritten is NaN, not yesterday's result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.tensors import fused_backends


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's own default"
    # warn_only: the point is the filling of torch.empty, not to forbid torch's own kernels
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every fused backend of the test module's OP that runs on the device under test."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        metafunc.parametrize("backend", fused_backends(metafunc.module.OP))
