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


@pytest.fixture(params=fused_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every fused backend of the norm that runs on the device under test."""
    return request.param
