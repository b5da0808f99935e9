"""A launch: programs over a grid, their arguments, what is counted, and the launcher's detour."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import product
from math import prod
from typing import Any

import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from support.gluon.copies import Descriptor
from support.gluon.global_memory import Pointer, Storage
from support.gluon.partitions import run_partition
from support.gluon.schedule import EmulationError, Schedule, Task, fault, here
from support.gluon.tensors import tensor
from support.gluon.twins import Jitted, twin
from swathe.kernels.core.gluon import TensorDescriptor
from swathe.kernels.core.launch import Launcher

SHARED_BYTES = 232_448  # what one program may have on sm_90
_RESIDENT = 3  # programs that run side by side at most


@dataclass
class Stats:
    """What launches did: bytes by copies, floating-point operations of products, and so on."""

    programs: int = 0
    shared_bytes: int = 0  # of the program that took most
    loaded_bytes: int = 0  # boxes count whole, also where they reach past a tensor's end
    stored_bytes: int = 0
    loads: int = 0
    stores: int = 0
    products: int = 0
    product_flops: int = 0
    transcendentals: int = 0
    moved: Counter[str] = field(default_factory=Counter)  # bytes of copies by parameter

    def loaded(self, descriptor: Descriptor) -> None:
        self.loads += 1
        self.loaded_bytes += descriptor.nbytes
        self.moved[descriptor.name] += descriptor.nbytes

    def stored(self, descriptor: Descriptor) -> None:
        self.stores += 1
        self.stored_bytes += descriptor.nbytes
        self.moved[descriptor.name] += descriptor.nbytes

    def multiplied(self, a: Sequence[int], b: Sequence[int]) -> None:
        self.products += 1
        self.product_flops += 2 * a[0] * a[1] * b[1]

    def add(self, other: Stats) -> None:
        """Count another launch's too."""
        for one in fields(self):
            mine, its = getattr(self, one.name), getattr(other, one.name)
            most = one.name == "shared_bytes"
            setattr(self, one.name, max(mine, its) if most else mine + its)


class Program:
    """One program: its place in the grid, its shared memory, its barriers."""

    def __init__(self, at: tuple[int, ...], grid: tuple[int, ...], stats: Stats) -> None:
        self.at, self.grid, self.stats = at, grid, stats
        self.buffers: list[Any] = []
        self.named: dict[int, Any] = {}
        self.loads: list[Any] = []
        self.shared_bytes = 0
        self.partitioned = False

    def claim(self, size: int, alignment: int) -> None:
        """Take so many bytes of shared memory."""
        if self.partitioned:
            raise fault("shared memory and mbarriers are allocated before partitions start")
        self.shared_bytes = -(-self.shared_bytes // alignment) * alignment + size
        if self.shared_bytes > SHARED_BYTES:
            raise fault(f"{self.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")

    def run(self, kernel: Jitted, args: Sequence[Any]) -> None:
        """Run the whole program, in its main partition."""
        run_partition(kernel.fn, args)
        clock = here().clock
        for load in self.loads:
            if not load.settled(clock):
                raise fault(f"a program ends, and nobody waited for the {load}")
        self.stats.programs += 1
        self.stats.shared_bytes = max(self.stats.shared_bytes, self.shared_bytes)


class _Launch:
    """Programs in a random order, a few of them side by side."""

    def __init__(self, kernel: Jitted, grid: Sequence[int], schedule: Schedule, warps: int) -> None:
        self.kernel, self.schedule, self.warps = kernel, schedule, warps
        self.grid = (*(int(n) for n in grid), 1, 1)[:3]
        self.stats = Stats()
        self.waiting = [(x, y, z) for z, y, x in product(*map(range, reversed(self.grid)))]
        schedule.random.shuffle(self.waiting)

    def start(self, args: Sequence[Any]) -> None:
        program = Program(self.waiting.pop(), self.grid, self.stats)
        task = Task(self.schedule, program, self.kernel.__name__, self.warps)

        def run() -> None:
            program.run(self.kernel, args)
            if self.waiting:
                self.start(args)

        self.schedule.start(task, run)


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    *,
    seed: int = 0,
    late: bool = True,
    num_warps: int = 4,
) -> Stats:
    """Run a Gluon kernel over a grid on CPU tensors, and say what it did.

    `args` stand in the order of the kernel's parameters: tensors, None, descriptors, numbers and
    constexprs. `seed` picks the schedule; without `late`, copies are complete when they are issued.
    Raises EmulationError for whatever the package's docstring says is found.
    """
    if prod(grid) < 1:
        raise EmulationError(f"grid {tuple(grid)}: there is no program to run")
    function = kernel if isinstance(kernel, Jitted) else _twin_of(kernel)
    schedule = Schedule(seed, late)
    launched = _Launch(function, grid, schedule, num_warps)
    values = _arguments(function, args)
    for _ in range(min(schedule.random.randint(1, _RESIDENT), len(launched.waiting))):
        launched.start(values)
    schedule.run()
    return launched.stats


def _twin_of(kernel: Any) -> Jitted:
    function = kernel.fn
    found = getattr(twin(function.__module__), function.__name__, None)
    if not isinstance(found, Jitted):
        raise EmulationError(f"{function.__module__} has no kernel {function.__name__}")
    return found


def _arguments(kernel: Jitted, args: Sequence[Any]) -> list[Any]:
    parameters = list(inspect.signature(kernel.fn).parameters.values())
    if len(parameters) != len(args):
        raise EmulationError(
            f"{kernel.__name__} takes {len(parameters)} arguments, not {len(args)}"
        )
    storages: dict[tuple[int, torch.dtype], Storage] = {}

    def storage_of(t: torch.Tensor) -> Storage:
        key = t.untyped_storage().data_ptr(), t.dtype
        if key not in storages:
            storages[key] = Storage(t)
        return storages[key]

    def converted(parameter: inspect.Parameter, value: Any) -> Any:
        if "constexpr" in str(parameter.annotation):
            return value
        if isinstance(value, torch.Tensor):
            storage = storage_of(value)
            storage.add(value)
            return Pointer(storage, value.storage_offset())
        if isinstance(value, TensorDescriptor):
            return Descriptor(parameter.name, value, storage_of(value.base))
        return value if value is None else tensor(value)

    return [converted(p, v) for p, v in zip(parameters, args, strict=True)]


@contextmanager
def emulated(*, seed: int = 0, late: bool = True) -> Iterator[Stats]:
    """Launchers of Gluon kernels run the emulator meanwhile; gives what all of them did."""
    total = Stats()
    genuine = Launcher.__call__

    signature = inspect.signature(genuine)

    def detour(self: Launcher, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.kernel, GluonJITFunction):
            genuine(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs).arguments
        groups = [given[name] for name in ("tensors", "specialised", "plain", "constants")]
        values = [value for group in groups for value in group]
        total.add(
            launch(
                self.kernel, given["grid"], values,
                seed=seed, late=late, num_warps=given["num_warps"],
            )
        )  # fmt: skip

    Launcher.__call__ = detour  # type: ignore[method-assign]
    try:
        yield total
    finally:
        Launcher.__call__ = genuine  # type: ignore[method-assign]
