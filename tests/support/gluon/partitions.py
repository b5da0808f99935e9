"""warp_specialize: partitions of a program that run side by side until all end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.gluon.schedule import Task, fault, here
from support.gluon.tensors import constant

_MOST_WARPS = 64


def warp_specialize(
    functions_and_args: Sequence[tuple[Any, Sequence[Any]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """Run the first function in this partition and each other in one of its own, until all end."""
    task = here()
    program, schedule = task.program, task.schedule
    (first, first_args), *others = functions_and_args
    _check(task, len(others), worker_num_warps, worker_num_regs)
    program.partitioned = True
    name, task.name = task.name, _name(first, first_args)
    workers = []
    for (function, args), warps in zip(others, worker_num_warps, strict=True):
        worker = Task(schedule, program, _name(function, args), warps)
        worker.acquire(task.release())
        workers.append(worker)
        schedule.start(worker, lambda f=function, a=args: run_partition(f, a))
    result = run_partition(first, first_args)
    schedule.wait(
        lambda: all(worker.done for worker in workers),
        lambda: f"{', '.join(worker.name for worker in workers if not worker.done)} to end",
    )
    for worker in workers:
        task.acquire(worker.clock)
    task.name = name
    program.partitioned = False
    return result


def run_partition(function: Any, args: Sequence[Any]) -> Any:
    """A partition's function, which must leave nothing in flight."""
    result = function(*args)
    task = here()
    if task.products:
        raise fault(f"a partition ends with {len(task.products)} products in flight")
    if task.stores:
        raise fault(f"a partition ends without a wait for its {len(task.stores)} last stores")
    return result


def _name(function: Any, args: Sequence[Any]) -> str:
    # one function often serves several partitions, told apart by a first constant
    index = f"({args[0]})" if args and isinstance(args[0], int) else ""
    return f"{function.__name__}{index}"


def _check(task: Task, workers: int, warps: Sequence[int], registers: Sequence[int] | None) -> None:
    if task.program.partitioned:
        raise fault("warp_specialize inside a partition")
    if workers != len(warps) or workers != len(registers if registers is not None else warps):
        raise fault(f"{workers} workers, warps for {len(warps)}, registers {registers}")
    counts = [constant(n, "a count of warps") for n in warps]
    if any(n < 1 or n & (n - 1) for n in counts) or task.warps + sum(counts) > _MOST_WARPS:
        raise fault(f"workers of {counts} warps: powers of two, {_MOST_WARPS} in a program at most")
    for count in registers or ():
        if constant(count, "a count of registers") % 8 or not 24 <= count <= 256:
            raise fault(f"{count} registers a thread: a multiple of 8 from 24 to 256")
