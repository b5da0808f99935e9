"""Which partition runs next: threads that hand one baton on, so that nothing is truly concurrent.

Kernels are ordinary functions, so each partition needs a thread of its own; but a thread runs only
while it holds the baton, and whoever holds it picks the next holder by a random source that starts
from a seed. The same seed gives the same order of everything. Copies in flight take turns as well.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from linecache import getline
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np

from support.numerics import SanitizerError

_HERE = str(Path(__file__).parent) + os.sep
_local = threading.local()
MOST_STEPS = 400_000  # of one launch; more than that is a loop without an end
Clock = dict[int, int]  # how much of each actor's past is settled: actor -> its time


class EmulationError(SanitizerError):
    """A Gluon kernel did something that hardware forbids, leaves undefined or waits for forever."""


class Abandoned(BaseException):
    """Ends a partition whose launch has failed; a kernel must not catch it."""


class Task:
    """One partition of one program.

    `number` names it among the actors of clocks; `ready` says whether it may go on, None where it
    waits for nothing, and `waits_for` says what it waits for.
    """

    def __init__(self, schedule: Schedule, program: Any, name: str, warps: int) -> None:
        self.schedule, self.program, self.name, self.warps = schedule, program, name, warps
        self.number = schedule.actor()
        self.clock: Clock = {self.number: 1}
        self.products: list[Any] = []  # products of matrices in flight, oldest first
        self.stores: list[Any] = []  # copies out that may still read shared memory, oldest first
        self.ready: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.baton = threading.Lock()
        self.baton.acquire()
        self.weight = 4.0 ** schedule.random.uniform(-1, 1)
        self.result: Any = None
        self.done = False

    def __str__(self) -> str:
        return f"partition {self.name} of program {self.program.at}"

    def release(self) -> Clock:
        """What this task's past gives to whoever synchronises with it now; later acts are newer."""
        given = dict(self.clock)
        self.clock[self.number] += 1
        return given

    def acquire(self, clock: Clock) -> None:
        """Another's past is settled for this task from now on."""
        join(self.clock, clock)


def join(clock: Clock, other: Clock) -> None:
    """Settle in `clock` whatever is settled in `other`."""
    for actor, time in other.items():
        if clock.get(actor, 0) < time:
            clock[actor] = time


def here() -> Task:
    """The partition that runs."""
    return _local.task


def where() -> str:
    """The line of the kernel that is being run."""
    file, line = _line()
    return f"{Path(file).name}:{line}" if file else "the launch"


def name_here(kind: str) -> str:
    """What the line that is being run makes: the variable it assigns to, if it does, and where."""
    file, line = _line()
    assigns = re.match(r"\s*(\w+)(?::[^=]*)?\s=\s", getline(file, line))
    return f"{assigns[1] if assigns else kind} ({where()})"


def _line() -> tuple[str, int]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_HERE):
            return ("", 0) if file == threading.__file__ else (file, frame.f_lineno)
        frame = frame.f_back
    return "", 0


def fault(text: str) -> EmulationError:
    """An error that says who was running, and where."""
    task = getattr(_local, "task", None)
    return EmulationError(f"{text} [{where()}, {task}]" if task is not None else text)


class Schedule:
    """All partitions of a launch, and copies in flight, in an order drawn from a seed.

    `late` lets copies take their time; else each is complete as soon as it is issued.
    """

    def __init__(self, seed: int, late: bool) -> None:
        self.random = Random(seed)
        self.late = late
        # some seeds switch at every chance and some rarely; some let copies lag behind
        self.calm = self.random.choice((0.0, 0.5, 0.9))
        self.haste = self.random.choice((0.02, 0.3, 0.8))
        self.tasks: list[Task] = []
        self.events: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._main = threading.Lock()
        self._actors = self._steps = 0

    def actor(self) -> int:
        """A number for something whose times clocks tell."""
        self._actors += 1
        return self._actors

    def _happen(self) -> None:
        # no partition's doing, whichever of them holds the baton meanwhile
        task, _local.task = getattr(_local, "task", None), None
        try:
            self.events.pop(self.random.randrange(len(self.events)))()
        finally:
            _local.task = task

    def later(self, event: Callable[[], None]) -> None:
        """Something that happens at a time of the schedule's choosing."""
        if self.late:
            self.events.append(event)
        else:
            event()

    def start(self, task: Task, function: Callable[[], Any]) -> None:
        """Let a task run from now on."""
        thread = threading.Thread(target=self._live, args=(task, function), daemon=True)
        self.tasks.append(task)
        self._threads.append(thread)
        thread.start()

    def run(self) -> None:
        """Run until every task is done; raise what the first failure was."""
        self._main.acquire()
        self._pick().baton.release()
        self._main.acquire()
        for task in list(self.tasks):  # of a launch that failed: each ends at its next step
            task.baton.release()
            self._main.acquire()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        while self.events:
            self._happen()

    def step(self) -> None:
        """A point at which another partition, or a copy, may come first."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise fault(f"no end after {MOST_STEPS} steps")
        if self.random.random() >= self.calm:
            self._pass_on(here())

    def wait(self, ready: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Go on once `ready()`; `waits_for` tells a report of a deadlock what is missing."""
        task = here()
        task.ready, task.waits_for = ready, waits_for
        self._pass_on(task)
        task.ready = None

    def _pass_on(self, task: Task) -> None:
        following = self._pick()
        if following is not task:
            following.baton.release()
            task.baton.acquire()
        if self.failure is not None:
            raise Abandoned

    def _pick(self) -> Task:
        while True:
            able = [task for task in self.tasks if task.ready is None or task.ready()]
            if self.events and (not able or self.random.random() < self.haste):
                self._happen()
            elif len(able) > 1:
                return self.random.choices(able, [task.weight for task in able])[0]
            elif able:
                return able[0]
            else:
                waiting = "\n  ".join(f"{task} waits for {task.waits_for()}" for task in self.tasks)
                raise EmulationError(f"deadlock:\n  {waiting}")

    def _live(self, task: Task, function: Callable[[], Any]) -> None:
        _local.task = task
        task.baton.acquire()
        np.seterr(all="ignore")  # a thread's own; what overflows is infinite on hardware too
        try:
            if self.failure is None:
                task.result = function()
        except Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  handed to whoever launched
            self._fail(task, error)
        self.tasks.remove(task)
        task.done = True
        following = None
        if self.failure is None and self.tasks:
            try:
                following = self._pick().baton
            except EmulationError as error:
                self._fail(task, error)
        (following or self._main).release()

    def _fail(self, task: Task, error: BaseException) -> None:
        if self.failure is None:
            if not isinstance(error, EmulationError):
                error.add_note(f"in {task}")
            self.failure = error
