"""One command for a GPU machine: is it right there, and how fast.

    python3 -m bench.gpu --out DIR [--ops rms_norm,...] [--parts parity,bench,host,models]
                         [--budget 560] [--commit HASH]

from the root of a checkout that need not be installed. It needs torch >= 2.11 and triton >= 3.6,
downloads nothing, and ends within the budget (seconds), of which whole models get MODELS_SHARE and
every op an equal share of the rest and what the ops before it left over: what did not fit is
listed as skipped.
Liger and quack take part where they can be imported; a pure-Python wheel that was unpacked into a
folder is enough:

    PYTHONPATH=peers python3 -m bench.gpu --out "$OUT"

Parts   parity: every kernel once in a process of its own, then the numerical contract over edge
        and full-size shapes, every dtype and casting, then reruns, CUDA graphs, streams, layouts,
        torch.compile, a tensor past 2^31 elements. bench: all contenders side by side, cold L2.
        host: Python's share of a call.
        models: whole models decode and train (bench.decoding, bench.training).
Output  DIR/<op>.json, DIR/decoding.json and DIR/training.json, written anew after every unit, so
        that a run that is cut off leaves what it had; DIR/logs; and a summary of every op and
        the models' tables on stdout (`python -m bench.report DIR/<op>.json` prints them again).
Status  0 all well, 1 something failed (the summary says what), 2 nothing could run here.

Without a GPU, `--dry-run` walks the same plan on the CPU with tiny shapes: it tests this code and
measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench import decoding, plan, training
from bench.ceilings import ceilings
from bench.contenders import contenders
from bench.lanes import Lane, Unit, run_lanes
from bench.models import shape_of
from bench.progress import Progress
from bench.record import document, save
from bench.report import summary
from bench.subject import OPS, Subject, subject
from bench.turns import Turns, document_of, fine, printed, usual
from swathe.kernels.core.cpp import why_unavailable
from swathe.kernels.core.registry import registered

Row = dict[str, Any]
# seconds kept back for writing and printing
_CLOSING = 8.0
MODELS_SHARE = 0.35  # of the budget: two models, decoded and trained
_TABLES = {
    "probe": "checks",
    "check": "checks",
    "parity": "parity",
    "bench": "benchmarks",
    "host": "host",
}


class Run:
    """The plan being worked off, and the results document that grows with it."""

    def __init__(self, of: Subject, out: Path, dry: bool, deadline: float) -> None:
        self.of, self.dry, self.deadline = of, dry, deadline
        self.device = "cpu" if dry else "cuda"
        self.backend = backend_for(of.op, self.device)
        self.file, self.logs = out / f"{of.op}.json", out / "logs" / of.op
        self.results: dict[str, Any] = {}
        self._ids = 0
        self._lock = threading.Lock()
        self._saved = 0.0

    def start(self, commit: str | None) -> None:
        """Write down where this is and who takes part."""
        present = contenders(self.of, self.device, compiled=not self.dry)
        self.results = {
            **document(self.of.op, self.device, commit),
            "dry_run": self.dry,
            "absent": {c.name: c.absent for c in present if c.absent},
            **{table: [] for table in (*dict.fromkeys(_TABLES.values()), "failed", "skipped")},
        }
        self.logs.mkdir(parents=True, exist_ok=True)

    def do(self, *lanes: list[Unit]) -> list[Row]:
        """Run lanes side by side; returns what failed in them."""
        if self.dry:
            # one process is enough where nothing can hang
            lanes = ([unit for units in lanes for unit in units],)
        runners = []
        for units in lanes:
            numbered = [{**unit, "id": self._ids + i} for i, unit in enumerate(units)]
            self._ids += len(units)
            runners.append(Lane(self.logs, numbered, self.deadline))
        run_lanes(runners, self._receive)
        failed = [failure for lane in runners for failure in lane.failed]
        self.results["failed"] += failed
        self.results["skipped"] += [unit for lane in runners for unit in lane.skipped]
        save(self.results, self.file)
        return failed

    def _receive(self, unit: Unit, row: Row) -> None:
        with self._lock:
            self.results[_TABLES[unit["kind"]]].append(row)
            if time.monotonic() - self._saved > 2.0:
                save(self.results, self.file)
                self._saved = time.monotonic()

    def all(self, parts: list[str]) -> None:
        """Every part asked for, correctness before speed."""
        where = (self.of, self.backend, self.device)
        broken = [failure["unit"]["probe"] for failure in self.do(plan.probes(*where))]
        if "parity" in parts:
            lanes = plan.parity_lanes(*where, self.dry)
            self.do(*lanes, plan.checks(*where, self.dry))
        timed: list[Unit] = []
        if "host" in parts:
            timed += plan.host_costs(*where, self.dry)
        if "bench" in parts:
            timed += plan.benchmarks(*where, self.dry, broken)
        self.do(timed)

    def wrong(self) -> bool:
        """Whether anything failed: a unit, a check, a bound, or one of our own contenders."""
        rows = self.results
        return bool(
            rows["failed"]
            or any(row.get("error") for row in rows["parity"])
            or any(row.get("error") and row["ours"] for row in rows["benchmarks"])
            or any(not row["result"].startswith(("ok", "not run")) for row in rows["checks"])
        )


def whole_models(out: Path, dry: bool, deadline: float, commit: str | None) -> bool:
    """Decode and train the plan's models until the deadline; whether ours all ran."""
    device = "cpu" if dry else "cuda"
    ceiling = ceilings(device, "bfloat16", dry=dry)
    tasks = {task.name: task for task in (decoding.TASK, training.TASK)}
    results = {
        name: document_of(task, device, ceiling, dry=dry, commit=commit)
        for name, task in tasks.items()
    }
    for unit in plan.whole_models(dry):
        task, found = tasks[unit["task"]], results[unit["task"]]
        if time.monotonic() < deadline:
            facts = {**unit, "device": device, "shape": shape_of(unit["model"], tiny=dry)}
            turns = Turns(task, facts, usual(task, dry=dry), deadline=deadline, limit_s=120.0)
            found["rows"] += turns.run(1 if dry else 2, ceiling)
        else:
            found["skipped"].append(unit["model"])
        save(found, out / f"{task.name}.json")
    for name, found in results.items():
        print(f"\n{printed(tasks[name], found)}", flush=True)
    return all(fine(row) for found in results.values() for row in found["rows"] if row["ours"])


def backend_for(op: str, device: str) -> str:
    """The backend under test: triton on a GPU, and what this CPU has for a dry run."""
    if device == "cuda":
        return "triton"
    return "cpp" if registered(op).get("cpp") and not why_unavailable() else "eager"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--ops", default=",".join(OPS), help="which ops, by comma")
    parser.add_argument("--parts", default=",".join(plan.PARTS), help="which parts, by comma")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--commit", help="commit to record where the copy has no .git")
    parser.add_argument("--dry-run", action="store_true", help="walk the plan on the CPU")
    asked = parser.parse_args(given)
    for name, allowed in (("ops", OPS), ("parts", plan.PARTS)):
        chosen = getattr(asked, name).split(",")
        unknown = sorted(set(chosen) - set(allowed))
        if unknown:
            parser.error(f"--{name}: {unknown} unknown; allowed: {','.join(allowed)}")
        setattr(asked, name, chosen)
    if asked.budget <= _CLOSING:
        parser.error(f"--budget {asked.budget:g}: give more than {_CLOSING:g} seconds")
    return asked


def main(given: list[str] | None = None) -> int:
    """Run, write, print; returns the exit status."""
    asked = arguments(given)
    if not asked.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu: torch sees no GPU here, so there is nothing to measure; "
            "use --dry-run to walk the plan on the CPU, or python -m bench.cpu to measure it",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + asked.budget - _CLOSING
    wrong, with_models = False, "models" in asked.parts
    ops = asked.ops if asked.parts != ["models"] else []
    kept = MODELS_SHARE * asked.budget if with_models else 0.0
    progress = Progress(len(ops) + with_models)
    for number, op in enumerate(ops):
        progress.step(op)
        share = (end - kept - time.monotonic()) / (len(ops) - number)
        run = Run(subject(op), asked.out, asked.dry_run, time.monotonic() + share)
        run.start(asked.commit)
        run.all(asked.parts)
        save(run.results, run.file)
        print(summary(run.results), flush=True)
        wrong = wrong or run.wrong()
    if with_models:
        progress.step("whole models")
        wrong = not whole_models(asked.out, asked.dry_run, end, asked.commit) or wrong
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
