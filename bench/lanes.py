"""Units of work in processes of their own: a hang or a crash costs one unit, never the run.

A lane is a list of units that run one after another in a worker process. The lane watches the
worker's log. A unit that runs longer than its limit, or whose process dies, is recorded as failed
with what it left on stderr, and a new process goes on with the next unit. Lanes run beside each
other; nothing may be timed while a second lane runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.record import ROOT
from bench.remote import end

Unit = dict[str, Any]
Row = dict[str, Any]
Receive = Callable[[Unit, Row], None]

_PAUSE = 0.1
_OVER = "the run's time is over"  # its unit is skipped then, not failed
_START = 60.0  # seconds a worker may take to import torch and reach the GPU


class Lane:
    """Runs units in order; `receive` gets every row, `failed` every unit that went wrong."""

    def __init__(self, folder: Path, units: Sequence[Unit], deadline: float) -> None:
        self.folder, self.deadline = folder, deadline
        self.left = list(units)
        self.failed: list[Row] = []
        self.skipped: list[Unit] = []
        self._launches = 0

    def run(self, receive: Receive) -> None:
        """Do everything that fits before the deadline (of time.monotonic)."""
        while self.left and time.monotonic() < self.deadline:
            self._one_process(receive)
        self.skipped, self.left = self.left, []

    def _one_process(self, receive: Receive) -> None:
        self._launches += 1
        stem = f"{self.left[0]['id']:04d}-{self._launches}"
        units, log = self.folder / f"{stem}.units.json", self.folder / f"{stem}.log.jsonl"
        errors = self.folder / f"{stem}.stderr.txt"
        units.write_text(json.dumps(self.left))
        log.touch()
        # measured kernels are compiled ones, whatever the caller's shell says
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with errors.open("wb") as stderr, log.open() as lines:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", str(units), str(log)],
                cwd=ROOT,
                env=environment,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                reason = self._watch(process, lines, receive)
            finally:
                end(process)
        if reason and reason != _OVER and self.left:
            unit = self.left.pop(0)
            tail = errors.read_text(errors="replace").strip()[-3000:]
            self.failed.append({"unit": unit, "error": reason, "stderr": tail})

    def _watch(self, process: Any, lines: Any, receive: Receive) -> str | None:
        """Read the log until the worker ends; the reason if its present unit failed."""
        began, limit, partial = time.monotonic(), _START, ""
        while True:
            ended = process.poll() is not None
            for line in lines:
                partial += line
                if not partial.endswith("\n"):
                    break  # a long line, half written
                entry, partial = json.loads(partial), ""
                unit = self.left[0]
                assert entry["id"] == unit["id"], "the log follows the list"
                if entry["state"] == "row":
                    receive(unit, entry["row"])
                elif entry["state"] == "start":
                    began, limit = time.monotonic(), unit["limit_s"]
                else:
                    self.left.pop(0)
                    began, limit = time.monotonic(), _START
            if ended:
                return None if process.returncode == 0 else f"exit status {process.returncode}"
            now = time.monotonic()
            if now - began > limit:
                return f"no end after {limit:.0f} s: stopped"
            if now > self.deadline:
                return _OVER
            time.sleep(_PAUSE)


def run_lanes(lanes: Sequence[Lane], receive: Receive) -> None:
    """All lanes side by side, each in a thread; an error in a lane is raised here."""
    with ThreadPoolExecutor(max(1, len(lanes))) as pool:
        for future in [pool.submit(lane.run, receive) for lane in lanes]:
            future.result()
