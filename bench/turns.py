"""Whole models measured in turn, each contender in a process of its own (bench.remote).

Rounds go through all contenders, in an order that moves on by one every round. Where all fit into
memory at once, a contender builds, compiles and warms up once and waits for its turns; else it does
so in every round. A contender that fails, hangs, is not installed or needs more memory than there
is costs its own row, which says so.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import models
from bench.model_contenders import ModelContender
from bench.record import document
from bench.remote import Remote, RemoteFailed
from bench.report import aligned

Row = dict[str, Any]
LIMIT_S = 300.0  # of one answer: a kernel that hangs costs one row
PROCESS_BYTES = 600 << 20  # of libraries, and of a GPU's context
OVER = "the run's time is over"
# random weights give equal losses up to rounding; a contender that is further off does other work
GATE = 0.02


@dataclass(frozen=True)
class Task:
    """What is measured of whole models; `name` is that of its module in bench and of its file.

    contenders  by name; "sdpa" is the base, or else the first that ran
    worker      makes what answers a process's requests: build(**facts), measure(**facts)
    figures     figures(facts, built, answers, ceilings) of one contender's rounds, for its row
    columns     heads of the table's columns after the contender and its rate
    cells       cells(row): what stands there
    training    whether gradients and optimiser states are needed
    """

    name: str
    contenders: Mapping[str, ModelContender]
    worker: Callable[[], Any]
    figures: Callable[[Row, Row, list[Row], Row], Row]
    columns: Sequence[str]
    cells: Callable[[Row], list[str]]
    training: bool


@dataclass
class _Seat:
    """One contender: its process while it has one, its answers, and what went wrong."""

    name: str
    needed: int = 0
    remote: Remote | None = None
    built: Row | None = None
    answers: list[Row] = field(default_factory=list)
    error: str | None = None

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()
            self.remote = None


class Turns:
    """All rounds of one model; `deadline` is of time.monotonic, `limit_s` of one answer."""

    def __init__(
        self,
        task: Task,
        facts: Row,
        names: Sequence[str],
        *,
        deadline: float = float("inf"),
        limit_s: float = LIMIT_S,
    ) -> None:
        self.task, self.facts = task, facts
        self.deadline, self.limit_s = deadline, limit_s
        self.free = models.bytes_free(facts["device"])
        self.seats = [self._seat(name) for name in names]

    def _seat(self, name: str) -> _Seat:
        contender, facts = self.task.contenders[name], self.facts
        absent = contender.absent()
        if absent is not None:
            return _Seat(name, error=f"not here: {absent}")
        needed = models.bytes_needed(
            facts["shape"],
            facts["batch"],
            facts["length"] + facts.get("new", 0),
            facts["dtype"],
            training=self.task.training,
            scores=contender.attention == "eager",
            logits=contender.logits,
        )
        seat = _Seat(name, needed)
        if needed > self.free:
            seat.error = (
                f"does not fit: needs about {needed / 1e9:.1f} GB, {self.free / 1e9:.1f} are free"
            )
        return seat

    def run(self, rounds: int, ceiling: Row) -> list[Row]:
        """A row for each contender."""
        playing = [seat for seat in self.seats if seat.error is None]
        # a share is left for what an estimate leaves out
        wanted = sum(seat.needed + PROCESS_BYTES for seat in playing)
        together = wanted < 0.8 * self.free
        with tempfile.TemporaryDirectory() as folder:
            try:
                if together:
                    for seat in playing:
                        self._open(seat, Path(folder))
                for turn in range(rounds):
                    shift = turn % max(1, len(playing))
                    for seat in playing[shift:] + playing[:shift]:
                        self._turn(seat, f"round {turn + 1} of {rounds}", Path(folder))
                        if not together or seat.error is not None:
                            seat.close()
            finally:
                for seat in self.seats:
                    seat.close()
        return self._rows(ceiling)

    def _open(self, seat: _Seat, folder: Path) -> None:
        errors = folder / f"{self.seats.index(seat)}.stderr.txt"
        module = f"bench.{self.task.name}"
        seat.remote = Remote(seat.name, module, "--serve", errors=errors)

    def _turn(self, seat: _Seat, what: str, folder: Path) -> None:
        if seat.error is not None:
            return
        print(
            f"{self.facts['model']} {self.task.name}, {what}: {seat.name}",
            file=sys.stderr,
            flush=True,
        )
        facts = {**self.facts, "contender": seat.name}
        try:
            fresh = seat.remote is None
            if fresh:
                self._open(seat, folder)
            assert seat.remote is not None
            if fresh or seat.built is None:
                built = self._ask(seat.remote, "build", facts)
                seat.built = seat.built or built
            seat.answers.append(self._ask(seat.remote, "measure", facts))
        except RemoteFailed as failed:
            over = time.monotonic() >= self.deadline
            # what was measured until then counts
            if not over or not seat.answers:
                seat.error = OVER if over else str(failed).removeprefix(f"{seat.name} ")
            seat.close()

    def _ask(self, remote: Remote, do: str, facts: Row) -> Row:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise RemoteFailed(OVER)
        return remote.ask(do, min(self.limit_s, left), **facts)

    def _rows(self, ceiling: Row) -> list[Row]:
        named = ("model", "batch", "length", "new", "dtype")
        facts = {name: self.facts[name] for name in named if name in self.facts}
        first = next((s for s in self.seats if s.built and s.name == "sdpa"), None)
        first = first or next((s for s in self.seats if s.built), None)
        rows = []
        for seat in self.seats:
            ours = self.task.contenders[seat.name].ours
            row = {**facts, "contender": seat.name, "ours": ours, "estimated_bytes": seat.needed}
            error = seat.error or (gate(seat.built, first.built) if first else None)
            if error is None and seat.built is not None:
                row |= self.task.figures(self.facts, seat.built, seat.answers, ceiling)
            else:
                row["error"] = error or OVER
            rows.append(row)
        return rows


def gate(built: Row | None, base: Row | None) -> str | None:
    """Why a contender does other work than the base, by the loss of the first tokens."""
    if built is None or base is None:
        return None
    found, expected = built["loss"], base["loss"]
    if abs(found - expected) <= GATE * abs(expected):
        return None
    return f"gate: first loss {found:.4f}, expected {expected:.4f}"


def fine(row: Row) -> bool:
    """Whether a row is no failure: figures, or a contender that is not here or does not fit."""
    error = row.get("error")
    return error is None or error.startswith(("not here", "does not fit", OVER))


def document_of(task: Task, device: str, ceiling: Row, *, dry: bool, commit: str | None) -> Row:
    """A results document without rows yet."""
    facts = {**document(task.name, device, commit), "dry_run": dry, "ceilings": ceiling}
    return {**facts, "rows": [], "skipped": []}


def usual(task: Task, *, dry: bool) -> list[str]:
    """The contenders of a run that names none: all, in a dry run those that compile nothing."""
    return [name for name, one in task.contenders.items() if not (dry and one.compiles)]


def printed(task: Task, results: Row) -> str:
    """A table for each model."""
    by_model: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_model.setdefault(row["model"], []).append(row)
    dry = "DRY RUN: tiny shapes, the numbers mean nothing\n\n" if results["dry_run"] else ""
    each = [f"{task.name}: {model}\n{table(task, rows)}" for model, rows in by_model.items()]
    skipped = [f"skipped, for time: {', '.join(results['skipped'])}"] * bool(results["skipped"])
    return dry + "\n\n".join(each + skipped)


def printed_again(results: Row) -> str:
    """The tables of a document that was read, whose task is that of its name."""
    return printed(import_module(f"bench.{results['op']}").TASK, results)


def table(task: Task, rows: Sequence[Row]) -> str:
    """Contenders of one model beside sdpa, or the first that ran; below, why others did not."""
    timed = [row for row in rows if "error" not in row]
    base = next((r for r in timed if r["contender"] == "sdpa"), timed[0] if timed else None)
    beside = f"of {base['contender']}'s" if base else "of sdpa's"
    body = [
        [
            row["contender"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}",
            f"{row['slowest']:.1f} to {row['fastest']:.1f}",
            *task.cells(row),
        ]
        for row in timed
        if base is not None
    ]
    head = ["contender", "tokens/s", beside, "range", *task.columns]
    reasons = [f"{row['contender']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*([aligned(head, body)] if body else []), *reasons])
