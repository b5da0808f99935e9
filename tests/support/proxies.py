"""What stands for speed where no GPU is: which kernels' baselines changed since a revision.

    cd tests && python -m support.gate --compare REVISION

prints one table: a line for each fact of machine code (`support.gate.facts`) that differs between
the baselines of that revision and those in the working tree. `verify` lets none become worse in
silence, but baselines can be written anew; here that shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = "tests/offline/baselines"
MORE_IS_BETTER = ("occupancy", "in_flight")

# Triton's version -> "configuration target" -> fact -> number, by op
Baselines = dict[str, dict[str, dict[str, dict[str, int]]]]


class Change(NamedTuple):
    """One fact of one kernel before and after; None where the kernel or the fact is not there."""

    op: str
    triton: str
    kernel: str
    fact: str
    before: int | None
    after: int | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "new" or "gone"."""
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        better = (self.after > self.before) is (self.fact in MORE_IS_BETTER)
        return "better" if better else "worse"


def baselines_at(revision: str, root: Path) -> Baselines:
    """The baselines of a revision; ValueError where git does not know it."""
    names = _git(root, "ls-tree", "--name-only", revision, f"{FOLDER}/").split()
    return {Path(n).stem: json.loads(_git(root, "show", f"{revision}:{n}")) for n in names}


def baselines_here(root: Path) -> Baselines:
    """Those in the working tree."""
    return {path.stem: json.loads(path.read_text()) for path in (root / FOLDER).glob("*.json")}


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"git {arguments[0]} said: {run.stderr.strip()}; give a known revision")
    return run.stdout


def changes(before: Baselines, after: Baselines) -> Iterator[Change]:
    """Every fact that differs, by op, version of Triton and kernel."""
    for op in sorted(before.keys() | after.keys()):
        old, new = before.get(op, {}), after.get(op, {})
        for triton in sorted(old.keys() | new.keys()):
            was, now = old.get(triton, {}), new.get(triton, {})
            for kernel in sorted(was.keys() | now.keys()):
                one, two = was.get(kernel), now.get(kernel)
                if one is None or two is None:
                    # the kernel itself came or went: one line says so
                    yield Change(op, triton, kernel, "all", one and len(one), two and len(two))
                    continue
                for fact in {**one, **two}:
                    if one.get(fact) != two.get(fact):
                        yield Change(op, triton, kernel, fact, one.get(fact), two.get(fact))


def table(found: list[Change]) -> str:
    """The changes as text, what became worse first, and how many there are of each."""
    if not found:
        return "no kernel's baseline changed"
    order = ("worse", "better", "new", "gone")
    found = sorted(found, key=lambda change: order.index(change.verdict))
    lines = [_line("verdict", "op", "triton", "fact", "before", "after", "kernel")]
    lines += [_line(c.verdict, c.op, c.triton, c.fact, c.before, c.after, c.kernel) for c in found]
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in order}
    said = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    return "\n".join([*lines, "", said])


def _line(*cells: str | int | None) -> str:
    verdict, op, triton, fact, before, after, kernel = ("-" if c is None else c for c in cells)
    return f"{verdict:7}  {op:20}  {triton:6}  {fact:12}  {before:>6}  {after:>6}  {kernel}"


def main(given: list[str], root: Path = ROOT) -> int:
    """Print the table; returns the exit status: 2 for a revision that git does not know."""
    if len(given) != 1:
        print(f"give one revision, got {given}; such as HEAD or origin/main", file=sys.stderr)
        return 2
    try:
        before = baselines_at(given[0], root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(list(changes(before, baselines_here(root)))))
    return 0
