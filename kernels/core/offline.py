"""Kernels compiled for a GPU that is not here: Triton's cache is filled, and nothing runs.

    with compiling_for("sm_90") as done:
        launch(torch.empty(2, 64, device="meta"), ...)     # any launcher, on tensors without data

Launchers take their usual way, and Triton specialises, compiles and keeps what it is given, for a
driver that knows nothing but the target. A GPU of that target finds the kernels again where the
cache lies at the same path (Triton writes it into the cache's files), Triton is the same wheel, and
arguments are specialised alike: dtypes, 16-byte alignment, integers that are 1 or multiples of 16.
Only a run on that GPU can confirm it. Triton 3.6 also builds a small C launcher for each signature
on the machine that launches, which is not among these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from swathe.kernels.core.device import interpreting, standing_for
from swathe.kernels.core.errors import BackendUnavailable
from swathe.kernels.core.launch import Launcher, why_no_triton

CAPABILITIES = {f"sm_{n}": n for n in (80, 86, 89, 90, 100, 103, 120)}
_devices = count(-1, -1)  # numbers that no GPU has: Triton keeps kernels by them


@dataclass
class Compiled:
    """What was compiled for `target`, what the cache had already, and where it lies."""

    target: str
    cache: Path
    compiled: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    hashes: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.compiled)} kernels compiled for {self.target} and {len(self.found)} found "
            f"in {self.cache}, {self.seconds:.0f} s"
        )


class _Absent:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: Any) -> None:
        self.target, self.device = target, next(_devices)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: str, tell: Callable[[str], object] | None = None) -> Iterator[Compiled]:
    """Let launchers compile for `target` ("sm_90") and not launch; `tell` hears of each kernel.

    Tensors are of the device "meta", which stands for the GPU meanwhile. Raises ValueError for an
    unknown target, BackendUnavailable where Triton is missing or interprets.
    """
    if target not in CAPABILITIES:
        raise ValueError(f"target {target!r} is unknown; allowed: {list(CAPABILITIES)}")
    reason = why_no_triton()
    if reason is None and interpreting():
        reason = "TRITON_INTERPRET is set, under which nothing is compiled; start without it"
    if reason is not None:
        raise BackendUnavailable(f"nothing can be compiled for {target}: {reason}")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    done = Compiled(target, Path(knobs.cache.dir))
    before: Any = driver._active  # asking for .active would look for a GPU
    listener, began = knobs.compilation.listener, time.perf_counter()

    def note(*, metadata: dict[str, Any], cache_hit: bool, **others: Any) -> None:
        (done.found if cache_hit else done.compiled).append(metadata["name"])
        done.hashes.add(metadata["hash"])
        if tell is not None:
            tell(f"{metadata['name']}: {'found' if cache_hit else 'compiled'}")
        if listener is not None:
            listener(metadata=metadata, cache_hit=cache_hit, **others)

    absent: Any = _Absent(GPUTarget("cuda", CAPABILITIES[target], 32))
    driver.set_active(absent)
    knobs.compilation.listener = note
    Launcher.launching = False
    try:
        with standing_for(CAPABILITIES[target]):
            yield done
    finally:
        Launcher.launching = True
        knobs.compilation.listener = listener
        driver._active = before
        done.seconds = time.perf_counter() - began
