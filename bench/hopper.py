"""Attention on Hopper: are the Gluon kernels right there, how fast, and which path ships.

    python -m bench.hopper --out DIR [--budget 560] [--parts parity,bench] [--commit HASH]
                           [--install | --fused]

One command for a machine with an H100 or H200, as `python -m bench.gpu`: from a checkout that need
not be installed, nothing downloaded, every kernel first in a process of its own with a limit, since
a wrong barrier hangs the card. Peers take part where they can be imported: SDPA's kernels (cuDNN,
flash), FlexAttention, flash-attn 2 and 3.

Parts   parity: the whole contract and bench.gpu's checks with backend "triton" on path "gluon", so
        that what the Gluon kernels do not serve runs as users would have it. bench: "gluon" and
        "triton" (portable) beside all peers, cold L2, with the copy's and the matrix product's
        speed in the same rounds.
Output  DIR/attention.json as bench.gpu writes it, with the clocks before and after; and
        DIR/paths.json, the decision: for each pass and pair of head sizes the path that was faster,
        "gluon" only where parity ran, nothing failed and it is ahead by MARGIN. `--install` writes
        it beside the kernels too, which is what `import swathe` reads on such a GPU.
Fused   with `--fused` backend "triton" is on path "gluon_fused" everywhere, whose reruns differ in
        the last bits of dq: checks of bits are left out, memory is not filled with NaN, and no path
        is decided on; backwards in two kernels ("gluon") and in one pass are set side by side.
Status  0 all well, 1 something failed (the summary says what), 2 there is no Hopper GPU here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import plan
from bench.gpu import Run
from bench.record import clocks, save
from bench.report import aligned, summary
from bench.subject import Subject, subject
from swathe.kernels.attention import paths
from swathe.kernels.core.tune import device_slug

Row = dict[str, Any]
MARGIN = 1.02  # how much faster the Gluon kernels must be to be taken
PARTS = ("parity", "bench")
_CLOSING = 8.0


def times(results: Row) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
    """Microseconds of "triton" and "gluon" by pass, D and E, in every bf16 cell that both serve.

    A backward's are those of forward and backward less the forward's.
    """
    of = subject("attention")
    cells: dict[tuple[str, str, bool], dict[str, float]] = {}
    for row in results["benchmarks"]:
        if row["dtype"] == "bfloat16" and "median_us" in row:
            variant = of.variant(row["variant"])
            if variant.alone:
                continue  # not of every form
            key = (row["shape"], variant.form, variant.backward)
            cells.setdefault(key, {})[row["backend"]] = row["median_us"]
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for (name, form, backward), cell in cells.items():
        shape = of.shape(name)
        pair = cell.get("triton"), cell.get("gluon")
        if backward:
            forward = cells.get((name, form, False), {})
            pair = tuple(
                cell[path] - forward[path] if path in cell and path in forward else None
                for path in ("triton", "gluon")
            )
        portable, gluon = pair
        if portable is None or gluon is None or min(portable, gluon) <= 0:
            continue
        which = "backward" if backward else "forward" if shape.T > 64 else "decode"
        found.setdefault((which, shape.D, shape.E), []).append((portable, gluon))
    return found


def decide(results: Row) -> tuple[paths.Table, list[list[str]]]:
    """The table that ships, and the lines that show why."""
    wrong = _wrong(results)
    table: paths.Table = {}
    lines = []
    for (which, D, E), pairs in sorted(times(results).items()):
        ratios = [portable / gluon for portable, gluon in pairs]
        middle = statistics.geometric_mean(ratios)
        reason = f"ahead by {middle:.2f}x"
        chosen = "gluon"
        if wrong:
            chosen, reason = "portable", f"{reason}, but {wrong}"
        elif middle < MARGIN:
            chosen, reason = "portable", f"{middle:.2f}x is under {MARGIN}"
        elif min(ratios) < 1 / MARGIN:
            chosen, reason = "portable", f"{reason}, but {min(ratios):.2f}x in one cell"
        table[which, D, E] = chosen
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append([which, f"{D}/{E}", str(len(pairs)), f"{middle:.2f}", spread, chosen, reason])
    return table, lines


def weigh(results: Row) -> list[list[str]]:
    """Lines that set a backward's two kernels ("gluon") and single pass ("triton") side by side."""
    lines = []
    for (which, D, E), pairs in sorted(times(results).items()):
        if which == "backward":
            ratios = [two / one for one, two in pairs]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            middle = statistics.geometric_mean(ratios)
            lines.append([which, f"{D}/{E}", str(len(pairs)), f"{middle:.2f}", spread])
    return lines


def _wrong(results: Row) -> str | None:
    """What speaks against the Gluon kernels altogether, or None."""
    left = [unit for unit in results["skipped"] if unit["kind"] != "bench"]
    if left or not results["parity"]:
        return f"parity is not shown: {len(left)} of its units did not run"
    failed = [failure["unit"].get("name", failure["unit"]["kind"]) for failure in results["failed"]]
    failed += [row["output"] for row in results["parity"] if row.get("error")]
    failed += [
        row["check"] for row in results["checks"] if not row["result"].startswith(("ok", "not run"))
    ]
    failed += [
        f"{row['shape']} {row['variant']}"
        for row in results["benchmarks"]
        if row["backend"] == "gluon" and row.get("error", "").startswith("gate")
    ]
    return f"{len(failed)} units are wrong, {failed[0]} first" if failed else None


class Job(Run):
    """bench.gpu's run of attention, on one path for what must be right, on both for what is timed.

    Workers read the path from their environment.
    """

    fused = False

    def all(self, parts: list[str]) -> None:
        """Every part asked for, correctness before speed."""
        where = (self.of, self.backend, self.device)
        self.results["clocks_before"] = clocks()
        os.environ[paths.VARIABLE] = "gluon_fused" if self.fused else "gluon"
        broken = [failure["unit"]["probe"] for failure in self.do(plan.probes(*where))]
        if "parity" in parts:
            # checks compare bits
            checks = [] if self.fused else [plan.checks(*where, self.dry)]
            self.do(*plan.parity_lanes(*where, self.dry), *checks)
        os.environ[paths.VARIABLE] = "gluon_fused" if self.fused else "portable"
        if "bench" in parts:
            # a kernel that hung in its probe would cost each of its cells the whole limit
            self.do(plan.benchmarks(self.of, "gluon", self.device, self.dry, broken))
        del os.environ[paths.VARIABLE]
        self.results["clocks_after"] = clocks()


def run(asked: argparse.Namespace, of: Subject) -> int:
    """Measure, decide, write, print; returns the exit status."""
    end = time.monotonic() + asked.budget - _CLOSING
    job = Job(of, asked.out, asked.dry_run, end)
    job.fused = asked.fused
    job.start(asked.commit)
    job.all(asked.parts)
    save(job.results, job.file)
    print(summary(job.results))
    if asked.fused:
        head = ["pass", "D/E", "cells", "gluon/gluon_fused", "range"]
        print(aligned(head, weigh(job.results)))
        return int(job.wrong())
    table, lines = decide(job.results)
    head = ["pass", "D/E", "cells", "portable/gluon", "range", "path", "why"]
    print(aligned(head, lines) if lines else "paths: nothing was timed on both")
    facts = {key: job.results[key] for key in ("date", "commit", "device", "versions")}
    files = [asked.out / "paths.json"]
    if asked.install and not asked.dry_run:
        files.append(paths.HOME / f"{device_slug(torch.device('cuda', 0))}.json")
    for file in files:
        paths.write(file, table, facts)
        print(f"wrote {file}")
    return int(job.wrong())


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.hopper", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by comma")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--commit", help="commit to record where the copy has no .git")
    parser.add_argument("--install", action="store_true", help="write the decision to the package")
    parser.add_argument("--fused", action="store_true", help="weigh the backward in one pass")
    parser.add_argument("--dry-run", action="store_true", help="walk the plan on the CPU")
    asked = parser.parse_args(given)
    asked.parts = asked.parts.split(",")
    unknown = sorted(set(asked.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {unknown} unknown; allowed: {','.join(PARTS)}")
    if asked.fused and asked.install:
        parser.error("--fused decides on no path, so there is none to --install; give one of them")
    if asked.budget <= _CLOSING:
        parser.error(f"--budget {asked.budget:g}: give more than {_CLOSING:g} seconds")
    return asked


def main(given: list[str] | None = None) -> int:
    """The command."""
    asked = arguments(given)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if not asked.dry_run and not hopper:
        print(
            "bench.hopper: torch sees no Hopper GPU (sm_90) here; use --dry-run to walk the plan "
            "on the CPU, or python -m bench.gpu on another GPU",
            file=sys.stderr,
        )
        return 2
    return run(asked, subject("attention"))


if __name__ == "__main__":
    sys.exit(main())
