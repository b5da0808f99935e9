"""The CPU's numbers: every cell, all contenders side by side, on all cores.

    python -m bench.cpu --out bench/results/cpu [--op rms_norm] [--rounds 15] [--shapes NAME,NAME]

writes <op>.json there and prints it. Run it on a machine that does nothing else; the whole
takes several minutes, half of it torch.compile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.cases import Cell
from bench.contenders import contenders
from bench.measure import ROUNDS, measure
from bench.record import document, save
from bench.report import summary
from bench.subject import OPS, subject

DTYPES = ("float32", "bfloat16")


def main(given: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for <op>.json")
    parser.add_argument("--op", choices=OPS, default=OPS[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS["cpu"])
    parser.add_argument("--shapes", help="names by comma; all without it")
    asked = parser.parse_args(given)
    of = subject(asked.op)
    allowed = [s.name for s in of.cpu]
    names = asked.shapes.split(",") if asked.shapes else allowed
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        parser.error(f"--shapes: {unknown} unknown; allowed: {allowed}")
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}: give one or more")
    everyone = contenders(of, "cpu")
    results = {**document(of.op, "cpu"), "benchmarks": []}
    results["absent"] = {c.name: c.absent for c in everyone if c.absent}
    cells = [
        Cell.of(of.op, shape, dtype, variant)
        for shape in of.cpu
        if shape.name in names
        for dtype in DTYPES
        for variant in of.variants_of(shape)
    ]
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell}", file=sys.stderr, flush=True)
        results["benchmarks"] += measure(cell, "cpu", everyone, rounds=asked.rounds)
        save(results, asked.out / f"{of.op}.json")
    print(summary(results))
    return int(any(row.get("error") and row["ours"] for row in results["benchmarks"]))


if __name__ == "__main__":
    sys.exit(main())
