"""What hardware a tensor lives on: its architecture, and the guard a launch runs under."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

_NO_GUARD = nullcontext()
_stands_for: int | None = None
_chosen_by_device: list[Callable[[], None]] = []


@lru_cache(maxsize=64)
def arch(device: torch.device) -> int | None:
    """Compute capability times ten (90 for Hopper) of an NVIDIA device; None for anything else."""
    if device.type == "meta":
        return _stands_for
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 16 on anything else, so that tests too run many programs."""
    if device.type != "cuda":
        return 16
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def standing_for(capability: int) -> Iterator[None]:
    """Let tensors without data pass for those of a GPU of this `arch`, for which one compiles."""
    global _stands_for
    before, _stands_for = _stands_for, capability
    for forget in _chosen_by_device:
        forget()
    try:
        yield
    finally:
        _stands_for = before
        for forget in _chosen_by_device:
            forget()


def chosen_by_device(forget: Callable[[], None]) -> None:
    """Call `forget` whenever tensors without data come to stand for another GPU."""
    _chosen_by_device.append(forget)


chosen_by_device(arch.cache_clear)


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current for a launch; costs nothing where it is current already."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NO_GUARD


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter: TRITON_INTERPRET, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
