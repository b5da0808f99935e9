"""mbarriers, whose phases count arrivals and bytes, and PTX's named barriers.

What a wait gives its partition: everything in the past of those who arrived in the phases that it
knows to be complete, and the copies that reported to them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real

from support.gluon.schedule import Clock, Task, fault, here, join, name_here
from support.gluon.tensors import constant, number

_MOST_ARRIVALS = 2**20 - 1
_NAMED = range(8, 16)  # PTX has 16; Triton takes the lower ones itself


class Mbarrier:
    """One mbarrier: `completed` phases, and what the present one still waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actor = here().schedule.actor()
        self.count: int | None = None
        self.completed = self.pending = self.bytes = 0
        self.copies: list[Any] = []  # in flight, to report here
        self.gathered: Clock = {}
        self.settled: Clock = {}
        self._ready: tuple[int, int] = (0, 0)  # whoever initialised it, and when

    def init(self, count: int) -> None:
        if self.count is not None:
            raise fault(f"{self.name} is initialised again")
        if not 1 <= count <= _MOST_ARRIVALS:
            raise fault(f"{self.name} is initialised with a count of {count}")
        task = here()
        self.count = self.pending = count
        self._ready = task.number, task.clock[task.number]

    def check(self) -> Task:
        """That it is initialised, in the running partition's past; gives the partition."""
        task = here()
        if self.count is None:
            raise fault(f"{self.name} is used but was never initialised")
        if task.clock.get(self._ready[0], 0) < self._ready[1]:
            raise fault(f"{self.name} is used with nothing to order that after its initialisation")
        return task

    def arrive(self, count: int) -> None:
        task = self.check()
        join(self.gathered, task.release())
        self.pending -= count
        if self.pending < 0:
            raise fault(f"{self.name} has {-self.pending} more arrivals than its count in a phase")
        self._settle()

    def expect(self, count: int) -> None:
        self.bytes += count
        self.arrive(1)

    def complete(self, copy: Any, count: int, past: Clock) -> None:
        """A copy reports its bytes."""
        join(self.gathered, past)
        self.copies.remove(copy)
        self.bytes -= count
        self._settle()

    def passed(self, parity: int) -> bool:
        """Whether a wait for that parity returns now."""
        return self.completed & 1 != parity

    def _settle(self) -> None:
        if self.pending:
            return
        if self.bytes < 0:
            raise fault(f"{self.name}: copies brought {-self.bytes} more bytes than it expected")
        if self.bytes == 0:
            if self.copies:
                raise fault(
                    f"{self.name} expects too few bytes: its phase is over before the copies"
                )
            assert self.count is not None
            self.completed += 1
            self.pending = self.count
            join(self.settled, self.gathered)
            self.settled[self.actor] = self.completed
            self.gathered = {}

    def __str__(self) -> str:
        lacks = f"{self.pending} of {self.count} arrivals"
        if self.bytes or self.copies:
            lacks += f" and {self.bytes} bytes, {len(self.copies)} copies being in flight"
        return f"{self.name}, whose phase {self.completed} lacks {lacks}"


class Barriers:
    """Some mbarriers, as kernels hold them."""

    def __init__(self, count: int, bars: list[Mbarrier] | None = None) -> None:
        if bars is None:
            here().program.claim(8 * count, 8)
            name = name_here("mbarriers")
            bars = [Mbarrier(f"{name}[{i}]" if count > 1 else name) for i in range(count)]
        self.bars = bars

    def index(self, index: Any) -> Barriers:
        at = number(index, "an index of mbarriers")
        if not 0 <= at < len(self.bars):
            raise fault(f"mbarrier {at} of {len(self.bars)}")
        return Barriers(1, [self.bars[at]])


def mbarriers(COUNT: int) -> Barriers:
    return Barriers(constant(COUNT, "a count of mbarriers"))


def one(barrier: Barriers) -> Mbarrier:
    """The single mbarrier that an operation takes."""
    if not isinstance(barrier, Barriers) or len(barrier.bars) != 1:
        raise fault("an operation on an mbarrier takes one of them: `.index(i)`")
    return barrier.bars[0]


def init(mbarrier: Barriers, count: int) -> None:
    one(mbarrier).init(constant(count, "a count"))


def invalidate(mbarrier: Barriers) -> None:
    bar = one(mbarrier)
    bar.check()
    bar.count = None


def wait(mbarrier: Barriers, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not pred:
        return
    bar, parity = one(mbarrier), number(phase, "a phase")
    task = bar.check()
    if parity not in (0, 1):
        raise fault(f"phase {parity}: a parity is 0 or 1")
    task.schedule.wait(lambda: bar.passed(parity), lambda: f"parity {parity} of {bar}")
    task.acquire(bar.settled)


def arrive(mbarrier: Barriers, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        one(mbarrier).arrive(constant(count, "a count"))
        here().schedule.step()


def expect(mbarrier: Barriers, bytes_per_cta: Any = None, pred: Any = True, **old: Any) -> None:
    count = constant(old.get("bytes", bytes_per_cta), "a count of bytes")
    if pred:
        one(mbarrier).expect(count)
        here().schedule.step()


mbarrier = SimpleNamespace(
    init=init,
    invalidate=invalidate,
    wait=wait,
    arrive=arrive,
    expect=expect,
    MBarrierLayout=real.MBarrierLayout,
)


class Named:
    """One named barrier of a program: who came in its present round."""

    def __init__(self) -> None:
        self.rounds = self.threads = self.came = 0
        self.tasks: list[Task] = []
        self.gathered: Clock = {}
        self.settled: Clock = {}

    def come(self, name: int, threads: int) -> int:
        """The running partition comes; gives the round that it came in."""
        task = here()
        if self.tasks and threads != self.threads:
            raise fault(
                f"named barrier {name} is of {threads} threads here, of {self.threads} there"
            )
        if task in self.tasks:
            raise fault(f"named barrier {name}: this partition comes twice in one round")
        self.threads = threads
        self.tasks.append(task)
        self.came += 32 * task.warps
        join(self.gathered, task.release())
        if self.came > threads:
            raise fault(f"named barrier {name} of {threads} threads: {self.came} came")
        here_in = self.rounds
        if self.came == threads:
            self.rounds, self.came, self.tasks = self.rounds + 1, 0, []
            join(self.settled, self.gathered)
            self.gathered = {}
        return here_in


def _named(name: Any, threads: Any) -> tuple[Named, int, int]:
    at, count = number(name, "a barrier's name"), constant(threads, "a count of threads")
    if at not in _NAMED:
        raise fault(f"named barrier {at}: {_NAMED.start} to {_NAMED.stop - 1} are free")
    if count not in (256, 384):
        raise fault(f"a named barrier of {count} threads: 256 and 384 are written")
    bar = here().program.named.setdefault(at, Named())
    return bar, at, bar.come(at, count)


def sync_warpgroups(name: Any, THREADS: int) -> None:
    bar, at, came_in = _named(name, THREADS)
    task = here()
    task.schedule.wait(
        lambda: bar.rounds > came_in,
        lambda: f"named barrier {at}, to which {bar.came} of {bar.threads} threads came",
    )
    task.acquire(bar.settled)


def arrive_warpgroups(name: Any, THREADS: int) -> None:
    _named(name, THREADS)
    here().schedule.step()


def partition_barrier() -> None:
    """Of one partition's warps, which are one thread here."""
    here().schedule.step()
