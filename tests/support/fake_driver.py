"""A Triton driver without a GPU: the real host path, real compilation, recorded launches.

`with fake_gpu("sm_90") as gpu:` makes Triton believe in a device whose tensors happen to lie in
CPU memory. Arguments are specialised, kernels are compiled for the target, shared memory, threads
and grid are held to its limits; instead of running, a launch is noted in `gpu.launches`. Faults of
loading and launching can be injected. Works with triton 3.6 to 3.9, in a process that does not
interpret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from triton.runtime import driver

from support.machine_code import SHARED_MEMORY, TARGETS
from swathe.kernels.core.launch import Launcher

GRID_LIMITS = (2**31 - 1, 65_535, 65_535)  # of CUDA and HIP alike


class LaunchError(RuntimeError):
    """The device would have refused this launch."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what ran, where, and with which specialisation."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    warps: int
    signature: dict[str, str]
    hash: str
    arguments: tuple[Any, ...]


@dataclass
class FakeGpu:
    """Triton's driver interface, as far as the host path uses it."""

    target: str
    multiprocessors: int = 132
    launches: list[Launch] = field(default_factory=list)
    fail_load: str | None = None
    fail_launch: str | None = None
    device: int = field(default_factory=count().__next__)
    stream: int = 7

    def __post_init__(self) -> None:
        self.utils = self
        self.launcher_cls = self._launcher

    @property
    def compilations(self) -> int:
        """Distinct compiled kernels among the launches."""
        return len({launch.hash for launch in self.launches})

    def get_current_target(self) -> Any:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "int"

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.target],
            "multiprocessor_count": self.multiprocessors,
            "warpSize": TARGETS[self.target].warp_size,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        if self.fail_load:
            raise RuntimeError(self.fail_load)
        return object(), object(), 32, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            if self.fail_launch:
                raise RuntimeError(self.fail_launch)
            grid = (x, y, z)
            if any(not 0 < n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=True)):
                raise LaunchError(f"grid {grid}; the limits are {GRID_LIMITS}")
            # function, packed metadata, launch metadata and two hooks precede the arguments
            about, *hooks = rest[2:5]
            for hook in hooks:
                if hook is not None:
                    hook(about)
            signature = {str(k): str(v) for k, v in source.signature.items()}
            warps, hash_ = metadata.num_warps, metadata.hash
            self.launches.append(
                Launch(metadata.name, grid, stream, warps, signature, hash_, rest[5:])
            )

        return launch


@contextmanager
def fake_gpu(target: str = "sm_90", **options: Any) -> Iterator[FakeGpu]:
    """Make `target` the active device for a while, under a device number of its own."""
    gpu = FakeGpu(target, **options)
    before = driver._active
    driver.set_active(gpu)
    Launcher.forget()
    try:
        yield gpu
    finally:
        driver._active = before
        Launcher.forget()
