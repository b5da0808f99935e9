"""Which accesses to memory are ordered, by clocks and not by the order that happened to be run.

Each partition, and each phase of an mbarrier, is an actor with a time of its own; a partition's
clock says up to which time it has each actor's past behind it. An access may touch what an earlier
one touched, if one of the two writes, only where the earlier one is finished in the later one's
past. So a missing wait or an early release is found in any order of execution, most often the
first.

Asynchronous units see shared memory through a proxy of their own: what partitions wrote is theirs
to see once the partition that wrote it has fenced it.
"""

from __future__ import annotations

import numpy as np

from support.gluon.schedule import Clock, Task, fault, here, where


class Access:
    """One read or write of a region of memory.

    `actor` and `time` say when it is finished, and are None and 0 while it is in flight. `fence` is
    the time of its task's fence after it; only partitions' own writes need one.
    """

    __slots__ = (
        "actor", "array", "dense", "fence", "generic", "high", "low",
        "task", "time", "what", "where", "writes",
    )  # fmt: skip

    def __init__(self, what: str, region: Region, *, writes: bool, generic: bool) -> None:
        self.what, self.writes, self.generic = what, writes, generic
        self.array, self.low, self.high, self.dense = region
        self.task: Task = here()
        self.where = where()
        self.actor: int | None = None
        self.time = 0
        self.fence: int | None = None

    def finish(self) -> None:
        """Finished now, as far as the running partition's past tells."""
        self.finish_at(self.task.number, self.task.clock[self.task.number])

    def finish_at(self, actor: int, time: int) -> None:
        """Finished for whoever has that actor's time behind it."""
        self.actor, self.time = actor, time

    def settled(self, clock: Clock) -> bool:
        """Whether this is finished in the past that a clock tells of."""
        return self.actor is not None and clock.get(self.actor, 0) >= self.time

    def __str__(self) -> str:
        return f"{self.what} by partition {self.task.name} at {self.where}"


Region = tuple[np.ndarray, int, int, bool]


def region_of(array: np.ndarray) -> Region:
    """An array as a region of memory: itself, its first byte, the one after its last, if dense."""
    low, high = np.lib.array_utils.byte_bounds(array)
    return array, low, high, high - low == array.nbytes


class Log:
    """The accesses to one buffer that later ones may still have to be ordered after."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[Access] = []

    def enter(self, access: Access) -> None:
        """Check an access that begins now against earlier ones, and keep it."""
        clock = access.task.clock
        keep = []
        for old in self.entries:
            if not _meet(access, old):
                keep.append(old)
                continue
            if access.writes or old.writes:
                self._check(access, old, clock)
            if not _outdated(old, access):
                keep.append(old)
        keep.append(access)
        self.entries = keep

    def _check(self, access: Access, old: Access, clock: Clock) -> None:
        if not old.settled(clock):
            state = "is in flight" if old.actor is None else "is not ordered before it"
            raise fault(f"race in {self.name}: {access.what} while the {old} {state}")
        hidden = old.fence is None or clock.get(old.task.number, 0) < old.fence
        if hidden and old.generic and old.writes and not access.generic:
            raise fault(
                f"missing fence in {self.name}: {access.what} of what the {old} left without a "
                f"fence_async_shared of its own before the barrier"
            )

    def fence(self, task: Task) -> None:
        """Show the asynchronous units what this task wrote."""
        for old in self.entries:
            if old.task is task and old.generic and old.writes and old.fence is None:
                old.fence = task.clock[task.number]


def _meet(a: Access, b: Access) -> bool:
    if a.low >= b.high or b.low >= a.high:
        return False
    return (a.dense and b.dense) or bool(np.shares_memory(a.array, b.array))


def _outdated(old: Access, new: Access) -> bool:
    # what comes after `new` comes after `old` too, or will be compared with `new` to the same end
    if new.writes:
        return new.dense and new.low <= old.low and old.high <= new.high
    same = old.low == new.low and old.high == new.high and old.dense == new.dense
    settled = not old.writes and old.task is new.task and old.actor is not None
    return settled and same and old.generic == new.generic and old.array.shape == new.array.shape
