"""One table over every op that was measured on a machine.

    python -m bench.overview bench/results/cpu [--markdown]

Times of ours over a peer's, below 1 where ours is the faster: the median of the cells that both
serve, and the worst of them in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import Document, aligned, line, ranked, ratios, read, where

PEERS = ("eager", "torch", "sdpa", "compile")


def documents(folder: Path) -> list[Document]:
    """The results of every op in a folder; ValueError where there is none."""
    files = sorted(folder.glob("*.json"))
    # the demo's figures lie there too
    found = [read(file) for file in files if "benchmarks" in json.loads(file.read_text())]
    if not found:
        raise ValueError(
            f"{folder} holds no results; make some with python -m bench.cpu --out {folder}"
        )
    return found


def table(found: Sequence[Document]) -> list[list[str]]:
    """Head and rows: an op, in how many cells it is the fastest, and beside each peer."""
    measured = [ratios(results) for results in found]
    peers = [name for name in PEERS if any(name in each for each in measured)]
    rows = [["op", "fastest in", *peers, "worst cell"]]
    for results, each in zip(found, measured, strict=True):
        cells = ranked(results)
        ahead = sum(cell[0] <= 1 for cell in cells)
        ratio, peer, cell = max(cells)
        rows.append(
            [
                results["op"],
                f"{ahead} of {len(cells)}",
                *(_beside(each.get(name)) for name in peers),
                f"{ratio:.2f} ({peer}): {cell}",
            ]
        )
    return rows


def _beside(found: list[float] | None) -> str:
    return f"{statistics.median(found):.2f} ({max(found):.2f})" if found else "-"


def markdown(found: Sequence[Document]) -> str:
    """The table for README, and where it was measured."""
    head, *body = table(found)
    rule = ["---", *["---:"] * (len(head) - 2), "---"]
    rows = [line([f"`{row[0]}`", *row[1:]]) for row in body]
    machine = where(found[0])
    return "\n".join([line(head), line(rule), *rows, "", f"{machine[0].upper()}{machine[1:]}."])


def main(given: list[str] | None = None) -> int:
    """Print the table of a folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.overview", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="the table as README has it")
    asked = parser.parse_args(given)
    try:
        found = documents(asked.folder)
    except (OSError, ValueError) as error:
        print(f"bench.overview: {error}", file=sys.stderr)
        return 2
    if asked.markdown:
        print(markdown(found))
    else:
        head, *body = table(found)
        print(f"{aligned(head, body)}\n\n{where(found[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
