"""Two runs of one op, cell by cell: what became faster, what slower, and what is noise.

    python -m bench.compare BEFORE.json AFTER.json [--all] [--markdown] [--fail]
                            [--confidence 0.95] [--noise peers|samples]
                            [--across op,machine,schema]

A cell's ratio is the median after over the median before, so that 1.10 is 10 % slower. Its band
says which ratios the noise leaves possible, from two sources, of which the wider counts:

samples  Each median lies in its own band (bench.spread: order statistics, no assumption on the
         noise); the ratio then lies between the ends of one over the opposite ends of the other.
         Both hold at 95 % each, so about 99 % of unchanged cells stay within.
peers    What differs between two runs and not within one (where memory lies, clocks, neighbours)
         no samples of one run can show. But the peers' code did not change: 95 % of their cells
         moved by less than some factor, and what moved ours less than that is no finding.
         For as many peers' cells as there are, the k-th smallest with k = 0.95 (n + 1) rounded up
         keeps that promise for any noise that ours and the peers share.

A cell is slower where the whole band lies above 1. Of n unchanged cells about n/40 come out slower
at 95 %: give --confidence 0.999 where a build depends on --fail.

Status: 0; 1 with --fail where a cell of ours is slower or broken; 2 where the files do not compare.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import BUSY, Document, Row, aligned, line, read, where
from bench.spread import CONFIDENCE, band

Key = tuple[str, str, str, str]
FASTER, SAME, SLOWER, BROKEN = "faster", "same", "slower", "broken"
_ALLOWED = ("op", "machine", "schema")


@dataclass(frozen=True)
class Cell:
    """One contender on one cell in both runs; `after` is None where it was timed before only."""

    before: Row
    after: Row | None
    low: float = math.nan
    high: float = math.nan

    @property
    def ratio(self) -> float:
        """Median after over median before; nan where there is none after."""
        return self.after["median_us"] / self.before["median_us"] if self.after else math.nan

    @property
    def verdict(self) -> str:
        """One of the four words."""
        if self.after is None:
            return BROKEN
        return SLOWER if self.low > 1 else FASTER if self.high < 1 else SAME


def cells(
    before: Document,
    after: Document,
    confidence: float = CONFIDENCE,
    *,
    peers: bool = True,
) -> list[Cell]:
    """Every contender on every cell that was timed before and taken up after, small ones first.

    `peers=False` leaves what the peers' cells moved out of the bands.
    """
    old, new = _timed(before), _timed(after)
    failed = {_key(row) for row in after["benchmarks"] if "error" in row}
    moved = factor(before, after, confidence) if peers else 1.0
    found = []
    for key, row in old.items():
        if key in new:
            ratio = new[key]["median_us"] / row["median_us"]
            (a, b), (c, d) = (band(r["samples_us"], confidence) for r in (row, new[key]))
            found.append(Cell(row, new[key], min(c / b, ratio / moved), max(d / a, ratio * moved)))
        elif key in failed:
            found.append(Cell(row, None))
    return sorted(found, key=lambda c: (c.before["traffic_bytes"], c.before["dtype"]))


def factor(before: Document, after: Document, confidence: float = CONFIDENCE) -> float:
    """The factor, 1 or more, within which that share of the peers' cells moved either way."""
    old, new = _timed(before), _timed(after)
    moves = sorted(
        abs(math.log(new[key]["median_us"] / row["median_us"]))
        for key, row in old.items()
        if key in new and not row["ours"]
    )
    # among n + 1 alike, each is as likely as any other to be the one that is ours
    wanted = min(len(moves), math.ceil(confidence * (len(moves) + 1)))
    return math.exp(moves[wanted - 1]) if moves else 1.0


def _key(row: Row) -> Key:
    return row["shape"], row["dtype"], row["variant"], row["backend"]


def _timed(results: Document) -> dict[Key, Row]:
    return {_key(row): row for row in results["benchmarks"] if row.get("samples_us")}


def objections(before: Document, after: Document, allowed: Sequence[str]) -> list[str]:
    """Why the two do not compare, but for what is allowed to differ."""
    machines = [{k: v for k, v in d["device"].items() if k != "load"} for d in (before, after)]
    pairs = {
        "op": (before["op"], after["op"]),
        "machine": tuple(machines),
        "schema": (before["schema"], after["schema"]),
    }
    found = [
        f"they are of different {what}s, {one} and {other}; --across {what} compares them anyway"
        for what, (one, other) in pairs.items()
        if one != other and what not in allowed
    ]
    dry = [name for name, d in (("first", before), ("second", after)) if d.get("dry_run")]
    found += [f"the {name} is of a dry run, whose times mean nothing" for name in dry]
    if not found and not _timed(before).keys() & _timed(after).keys():
        found.append("no cell was timed in both; run both over the same shapes")
    return found


def ceilings(before: Document, after: Document) -> list[list[str]]:
    """Head and rows: what the machine itself reached in either run, and after over before."""
    rows = [["fastest", "before", "after", "after / before"]]
    for column, name in (
        ("copy_gbps", "copy, GB/s"),
        ("product_tflops", "matrix product, TFLOP/s"),
    ):
        both = [[r[column] for r in _timed(d).values() if column in r] for d in (before, after)]
        if all(both):
            old, new = map(max, both)
            rows.append([name, f"{old:.4g}", f"{new:.4g}", f"{new / old:.2f}"])
    return rows


def table(found: Sequence[Cell]) -> list[list[str]]:
    """Head and rows of the cells."""
    head = ["size", "dtype", "variant", "backend", "before", "after", "ratio", "band", "verdict"]
    body = []
    for cell in found:
        row, after = cell.before, cell.after
        body.append(
            [
                row["size"],
                *(row[name] for name in ("dtype", "variant", "backend")),
                f"{row['median_us']:.1f}",
                f"{after['median_us']:.1f}" if after else "-",
                f"{cell.ratio:.2f}" if after else "-",
                f"{cell.low:.2f} to {cell.high:.2f}" if after else "-",
                cell.verdict,
            ]
        )
    return [head, *body]


def summary(found: Sequence[Cell], before: Document, after: Document, confidence: float) -> str:
    """Lines on ours, on the peers, and on what spoils the comparison."""
    ours, peers = ([c for c in found if c.before["ours"] is which] for which in (True, False))
    lines = [f"ours: {_counts(ours)}"]
    if peers:
        moved = factor(before, after, confidence)
        lines.append(f"peers: {_counts(peers)}; {confidence:.1%} moved by less than {moved:.2f}x")
    else:
        lines.append("peers: none in both, so that noise from run to run is not in the bands")
    changed = [
        f"{name} {old} and {after['versions'].get(name)}"
        for name, old in before["versions"].items()
        if name != "swathe" and after["versions"].get(name) != old
    ]
    lines += [f"versions differ, and peers with them: {', '.join(changed)}"] * bool(changed)
    for name, results in (("before", before), ("after", after)):
        load = results["device"].get("load", 0.0)
        lines += [f"{name}: load {load} when it began: BUSY, do not trust it"] * (load > BUSY)
    return "\n".join(lines)


def _counts(found: Sequence[Cell]) -> str:
    counts = Counter(cell.verdict for cell in found)
    said = ", ".join(f"{counts[v]} {v}" for v in (FASTER, SAME, SLOWER, BROKEN) if counts[v])
    ratios = [cell.ratio for cell in found if cell.after]
    median = f", median ratio {statistics.median(ratios):.2f}" if ratios else ""
    return f"{said or 'none'} of {len(found)} cells{median}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(map(line, [head, ["---", *["---:"] * (len(head) - 1)], *body]))


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="the peers' cells too")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--fail", action="store_true", help="status 1 where ours is slower")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of bands")
    parser.add_argument("--noise", choices=("peers", "samples"), default="peers")
    parser.add_argument("--across", default="", help=f"what may differ: {','.join(_ALLOWED)}")
    asked = parser.parse_args(given)
    asked.across = [what for what in asked.across.split(",") if what]
    if unknown := sorted(set(asked.across) - set(_ALLOWED)):
        parser.error(f"--across: {unknown} unknown; allowed: {','.join(_ALLOWED)}")
    if not 0 < asked.confidence < 1:
        parser.error(f"--confidence {asked.confidence:g}: give a share between 0 and 1")
    return asked


def main(given: list[str] | None = None) -> int:
    """Compare and print; returns the exit status."""
    asked = _arguments(given)
    try:
        before, after = (read(path, any_schema=True) for path in (asked.before, asked.after))
        if found := objections(before, after, asked.across):
            raise ValueError(f"{asked.before} and {asked.after}: {'; '.join(found)}")
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    compared = cells(before, after, asked.confidence, peers=asked.noise == "peers")
    shown = [cell for cell in compared if asked.all or cell.before["ours"]]
    drawn = _markdown if asked.markdown else lambda rows: aligned(rows[0], rows[1:])
    print(f"{before['op']}\nbefore: {where(before)}\nafter: {where(after)}\n")
    print(drawn(table(shown)), drawn(ceilings(before, after)), sep="\n\n", end="\n\n")
    print(summary(compared, before, after, asked.confidence))
    worse = any(c.verdict in (SLOWER, BROKEN) for c in compared if c.before["ours"])
    return int(asked.fail and worse)


if __name__ == "__main__":
    sys.exit(main())
