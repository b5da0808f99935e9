"""The CPU's numbers: every cell, all contenders side by side, on all cores.

    python -m bench.cpu --out bench/results/cpu [--op rms_norm] [--shapes NAME,NAME]
                        [--dtypes float32,bfloat16] [--sittings 5] [--rounds 7]
    python -m bench.cpu --out DIR --quick

writes <op>.json there and prints it. Run it on a machine that does nothing else; an op takes
several minutes, half of it torch.compile. Each cell is measured in sittings that lie a whole pass
over all cells apart, so that their medians show by how much two runs differ. `--quick` measures a
few cells of every op, in under three minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from bench.cases import DTYPES as KNOWN
from bench.cases import Cell
from bench.cells import DTYPES, cells, contenders_of
from bench.contenders import contenders
from bench.measure import ROUNDS, SITTINGS, Measured
from bench.progress import Progress
from bench.record import document, save
from bench.report import summary
from bench.subject import OPS, subject

Row = dict[str, Any]
QUICK_SITTINGS = 3


def main(given: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit status."""
    asked = _arguments(given)
    ops = [asked.op] if asked.op else list(OPS if asked.quick else OPS[:1])
    failed = False
    for number, op in enumerate(ops, 1):
        print(f"{op}: op {number} of {len(ops)}", file=sys.stderr)
        results = run(op, asked)
        print(summary(results))
        failed |= any(row.get("error") and row["ours"] for row in results["benchmarks"])
    return int(failed)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for <op>.json")
    parser.add_argument("--op", choices=OPS, help=f"{OPS[0]} without it; with --quick, all")
    parser.add_argument("--quick", action="store_true", help="a few cells")
    parser.add_argument("--sittings", type=int, help="of each cell, lying apart")
    parser.add_argument("--rounds", type=int, default=ROUNDS["cpu"], help="of a sitting")
    parser.add_argument("--shapes", help="names by comma; all without it")
    parser.add_argument("--dtypes", default=",".join(DTYPES["cpu"]), help="by comma")
    asked = parser.parse_args(given)
    asked.sittings = asked.sittings or (QUICK_SITTINGS if asked.quick else SITTINGS["cpu"])
    asked.dtypes = tuple(asked.dtypes.split(","))
    shapes = [s.name for s in subject(asked.op or OPS[0]).cpu]
    asked.shapes = asked.shapes.split(",") if asked.shapes else None
    for option, chosen, allowed in (
        ("--shapes", asked.shapes or (), shapes),
        ("--dtypes", asked.dtypes, list(KNOWN)),
    ):
        unknown = sorted(set(chosen) - set(allowed))
        if unknown:
            parser.error(f"{option}: {unknown} unknown; allowed: {allowed}")
    if asked.quick and asked.shapes:
        parser.error("--quick chooses the shapes; leave out --shapes or --quick")
    if min(asked.rounds, asked.sittings) < 1:
        parser.error("--rounds and --sittings: give one or more")
    return asked


def run(op: str, asked: argparse.Namespace) -> Row:
    """The results of one op, written after every cell."""
    which = "quick" if asked.quick else "all"
    chosen = [
        cell
        for cell in cells(op, "cpu", which, asked.dtypes)
        if asked.shapes is None or cell.shape in asked.shapes
    ]
    results: Row = {**document(op, "cpu"), "benchmarks": []}
    results["absent"] = {c.name: c.absent for c in contenders(subject(op), "cpu") if c.absent}
    progress = Progress(len(chosen) * asked.sittings)
    measured: dict[Cell, Measured] = {}
    for sitting in range(asked.sittings):
        # another order each time, so that no cell always follows the same one
        order = random.Random(sitting).sample(chosen, len(chosen)) if sitting else chosen
        for cell in order:
            progress.step(cell if not sitting else f"{cell}, again")
            if cell not in measured:
                measured[cell] = Measured(cell, "cpu", contenders_of(cell, "cpu", which))
            measured[cell].sit(asked.rounds)
            done = [one for one in chosen if one in measured]
            results["benchmarks"] = [row for one in done for row in measured[one].rows()]
            save(results, asked.out / f"{op}.json")
    return results


if __name__ == "__main__":
    sys.exit(main())
