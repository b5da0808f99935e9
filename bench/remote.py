"""A contender in a process of its own, which answers requests: JSON lines on stdin and stdout.

A process each, so that peak memory belongs to one library and a crash or a hang costs no other. It
waits while others are asked, so that rounds can go through all of them in turn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any, TextIO

from bench.record import ROOT


class RemoteFailed(RuntimeError):
    """A process ended, or took too long, before it answered."""


class Remote:
    """A process that runs a module: `remote.ask("load", dtype="bfloat16")`.

    `name` is for messages. What the process writes to stderr goes to `errors`, whose last line is
    then in the message of a failure, or without a file to this process's own.
    """

    def __init__(self, name: str, module: str, *arguments: str, errors: Path | None = None) -> None:
        self.name, self.errors = name, errors
        # a GPU's kernels are compiled here, whatever the caller's shell says
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        stderr = None if errors is None else errors.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        if stderr is not None:
            stderr.close()
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # a pipe cannot be waited for with a limit everywhere, a queue can
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def start(self, do: str, **arguments: Any) -> None:
        """Send a request without waiting for the answer."""
        assert self.process.stdin is not None
        # a process that has ended is reported by `answer`
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)

    def answer(self, limit_s: float | None = None) -> dict[str, Any]:
        """The answer to the oldest request. Raises RemoteFailed if there is none in `limit_s`."""
        try:
            line = self._lines.get(timeout=None if limit_s is None else max(0.0, limit_s))
        except Empty:
            self.close()
            raise RemoteFailed(f"{self.name} took longer than {limit_s:.0f} s") from None
        if not line:
            raise RemoteFailed(
                f"{self.name} ended with status {self.process.wait()}{self._message()}"
            )
        return json.loads(line)

    def _message(self) -> str:
        if self.errors is None:
            return "; its message is above"
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:500]}" if lines else ""

    def ask(self, do: str, limit_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self.start(do, **arguments)
        return self.answer(limit_s)

    def close(self) -> None:
        """End the process and every one that it started."""
        end(self.process)
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that has a session of its own: compilers that it started go with it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(answering: Any, requests: Iterable[str], replies: TextIO) -> None:
    """Answer requests {"do": method, ...arguments} until there are no more."""
    for line in requests:
        request = json.loads(line)
        answer = getattr(answering, request.pop("do"))(**request)
        print(json.dumps(answer), file=replies, flush=True)


def serve_here(answering: Any) -> None:
    """Answer this process's stdin on its stdout."""
    # what a library prints must not land between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(answering, sys.stdin, answers)
