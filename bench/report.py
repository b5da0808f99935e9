"""From results JSON to text: `python -m bench.report FILE` prints it, `markdown` fills README.

python -m bench.report bench/results/cpu/rms_norm.json [--markdown]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.record import SCHEMA
from bench.spread import band

BAND = "ours, 95 %"  # heads the column of the bands
BUSY = 0.7  # load average beyond which a CPU's times are not to be trusted

Row = dict[str, Any]
Document = dict[str, Any]
Group = dict[str, dict[str, Row]]  # shape -> backend -> row


def read(path: Path, *, any_schema: bool = False) -> Document:
    """A results document; ValueError if the file is none or, unless allowed, of another schema."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; run python -m bench.cpu again") from error
    found = results.get("schema") if isinstance(results, dict) else None
    if found is None or (found != SCHEMA and not any_schema):
        raise ValueError(
            f"{path} has schema {found!r}, this report reads {SCHEMA}; "
            "make the file again with python -m bench.cpu or python -m bench.gpu"
        )
    return results


def groups(results: Document) -> dict[tuple[str, str], Group]:
    """Rows by (dtype, variant), then shape, then backend, in the order they were measured."""
    found: dict[tuple[str, str], Group] = {}
    for row in results["benchmarks"]:
        group = found.setdefault((row["dtype"], row["variant"]), {})
        group.setdefault(row["shape"], {})[row["backend"]] = row
    return found


def backends(results: Document) -> list[str]:
    """Every backend with a row, ours first."""
    rows = sorted(results["benchmarks"], key=lambda r: not r["ours"])
    return list(dict.fromkeys(row["backend"] for row in rows))


def against_best(cells: dict[str, Row]) -> tuple[float, str] | None:
    """Time of ours over the fastest peer's, and that peer; None where one of them is missing."""
    timed = [r for r in cells.values() if "median_us" in r]
    ours = [r for r in timed if r["ours"]]
    peers = [r for r in timed if not r["ours"]]
    if not ours or not peers:
        return None
    best = min(peers, key=lambda r: r["median_us"])
    return ours[0]["median_us"] / best["median_us"], best["backend"]


def ranked(results: Document) -> list[tuple[float, str, str]]:
    """Each cell that has ours and a peer: time of ours over the fastest's, its name, the cell."""
    found = []
    for (dtype, variant), group in groups(results).items():
        for shape, cells in group.items():
            beside = against_best(cells)
            if beside:
                row = next(r for r in cells.values() if r["ours"])
                found.append((*beside, f"{shape} ({row['size']}) {dtype} {variant}"))
    return found


def worst(results: Document) -> str:
    """The cell where ours looks worst beside its fastest peer."""
    cells = ranked(results)
    if not cells:
        return "worst cell: none (no cell has both ours and a peer)"
    ratio, peer, name = max(cells)
    ahead = sum(cell[0] <= 1 for cell in cells)
    return (
        f"worst cell: {name}: {ratio:.2f}x the time of {peer}; "
        f"ours is the fastest in {ahead} of {len(cells)} cells"
    )


def _us(row: Row | None) -> str:
    if row is None or unserved(row):
        return "-"
    return f"{row['median_us']:.1f}" if "median_us" in row else "failed"


def unserved(row: Row) -> bool:
    """A peer that has no such form says so when it is prepared; that is no failure."""
    return not row["ours"] and row.get("error", "").startswith("NotImplementedError: ")


def _body(group: Group, names: Sequence[str]) -> list[list[str]]:
    body = []
    for shape, cells in group.items():
        first = next(iter(cells.values()))
        ours = next((r for r in cells.values() if r["ours"] and "median_us" in r), None)
        found = against_best(cells)
        body.append(
            [
                shape,
                first["size"],
                *(_us(cells.get(name)) for name in names),
                _band(ours),
                f"{ours['gbps']:.{1 if ours['gbps'] < 100 else 0}f}" if ours else "-",
                f"{ours['of_copy']:.2f}" if ours else "-",
                *(_flops(ours) if any("tflops" in row for row in cells.values()) else ()),
                f"{found[0]:.2f} {found[1]}" if found else "-",
            ]
        )
    return body


def _band(ours: Row | None) -> str:
    """Between which values the true median of ours lies, at 95 %."""
    samples = ours.get("samples_us") if ours else None
    return " to ".join(f"{end:.1f}" for end in band(samples)) if samples else "-"


def _flops(ours: Row | None) -> tuple[str, str]:
    return (f"{ours['tflops']:.0f}", f"{ours['of_product']:.2f}") if ours else ("-", "-")


def ratios(results: Document) -> dict[str, list[float]]:
    """Time of ours over each peer's, in the cells that both serve."""
    found: dict[str, list[float]] = {}
    for group in groups(results).values():
        for cells in group.values():
            ours = next((r for r in cells.values() if r["ours"] and "median_us" in r), None)
            for name, row in cells.items():
                if ours and not row["ours"] and "median_us" in row:
                    found.setdefault(name, []).append(ours["median_us"] / row["median_us"])
    return found


def beside_each(results: Document) -> list[str]:
    """Lines on the times of ours over each peer's."""
    return [
        f"  {name}: {statistics.median(found):.2f}, at worst {max(found):.2f} ({len(found)} cells)"
        for name, found in ratios(results).items()
    ]


def aligned(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    lines = [list(head), *map(list, body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in ([*zip(line, widths, strict=True)] for line in lines)
    )


def where(results: Document) -> str:
    """One line on the machine and the versions."""
    device, versions = results["device"], results["versions"]
    facts = [device["name"]]
    if device["kind"] == "cpu":
        facts += [f"{device['threads']} threads of {device['cores']} cores", device["isa"]]
    else:
        facts.append(f"compute capability {device['arch']}")
    facts += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    return f"{', '.join(facts)}; commit {results['commit']}, {results['date'][:10]}"


def tables(results: Document) -> str:
    """Every benchmark table as text."""
    names = backends(results)
    counted = any("tflops" in row for row in results["benchmarks"])
    arithmetic = ["TFLOP/s", "of product"] * counted
    head = ["shape", "size", *names, BAND, "GB/s", "of copy", *arithmetic, "time / best peer"]
    # the longest tables last: the end of a log is what is read
    ordered = sorted(groups(results).items(), key=lambda item: len(item[1]))
    parts = [
        f"{results['op']}: {dtype}, {variant}, us\n{aligned(head, _body(group, names))}"
        for (dtype, variant), group in ordered
    ]
    fastest = max((r.get("copy_gbps", 0.0) for r in results["benchmarks"]), default=0.0)
    ceiling = f"copy: up to {fastest:.0f} GB/s; each cell is held to a copy of its own traffic"
    fastest = max((r.get("product_tflops", 0.0) for r in results["benchmarks"]), default=0.0)
    ceiling += f"\nmatrix product: up to {fastest:.0f} TFLOP/s" * counted
    beside = beside_each(results)
    if beside:
        parts.append("\n".join(["time of ours over that of each peer", *beside]))
    return "\n\n".join([*parts, f"{ceiling}\n{worst(results)}"])


def _parity(results: Document) -> str:
    head = ["shapes", "output", "dtype", "rho_ideal", "rho_eager", "elements"]
    body = [
        [str(row[name]) for name in head] for row in results.get("parity", []) if "output" in row
    ]
    return (
        f"{results['op']}: parity of {results['parity'][0]['backend']}\n{aligned(head, body)}"
        if body
        else ""
    )


def _host(results: Document) -> str:
    body = [
        [f"{r['way']} ({r['shape']})", *(f"{r[k]:.1f}" for k in ("median_us", "min_us", "max_us"))]
        for r in results.get("host", [])
    ]
    return f"host us a call\n{aligned(['way', 'median', 'min', 'max'], body)}" if body else ""


def _troubles(results: Document) -> list[str]:
    found = [
        f"{row['unit'].get('name') or row['unit']['kind']} "
        f"{row['unit'].get('shape', '')} {row['unit'].get('dtype', '')}: {row['error']}: "
        f"{row['stderr'][-300:].splitlines()[-1:]}"
        for row in results.get("failed", [])
    ]
    found += [
        f"contract {r['shapes']} {r['dtype']}: {r['error'][:600]}"
        for r in results.get("parity", [])
        if r.get("error")
    ]
    found += [
        f"{r['backend']} on {r['shape']} {r['dtype']} {r['variant']}: {r['error'].splitlines()[0]}"
        for r in results["benchmarks"]
        if r.get("error") and not unserved(r)
    ]
    return found


def summary(results: Document) -> str:
    """Everything a reader of a finished run wants, most important last."""
    checks = [f"  {r['check']}: {r['result']}" for r in results.get("checks", [])]
    absent = [f"  {name}: {why}" for name, why in results.get("absent", {}).items()]
    troubles = [f"  {line}" for line in _troubles(results)]
    skipped = [
        f"  {u['kind']} {u.get('name') or u.get('shape', '')} {u.get('dtype', '')}"
        if not isinstance(u.get("shapes"), list)
        else f"  parity large {u['dtype']}"
        for u in results.get("skipped", [])
    ]
    load = results["device"].get("load", 0.0)
    busy = f"BUSY MACHINE: load {load} before the run; do not publish these times"
    dry = "DRY RUN: tiny shapes on a CPU, the numbers mean nothing"
    parts = [
        dry if results.get("dry_run") else busy if load > BUSY else "",
        _parity(results),
        _host(results),
        tables(results) if results["benchmarks"] else "",
        *(
            "\n".join([title, *lines]) if lines else ""
            for title, lines in (
                ("checks", checks),
                ("absent", absent),
                ("skipped, for time", skipped),
                ("FAILED", troubles),
            )
        ),
        where(results),
    ]
    return "\n\n".join(part for part in parts if part)


def markdown(results: Document, variants: Sequence[str] | None = None) -> str:
    """The tables for README: microseconds a call, medians; ours over the fastest peer last."""
    names = backends(results)
    head = ["size", *names, BAND, "of copy", "best peer / ours"]
    parts = []
    for (dtype, variant), group in groups(results).items():
        if variants is not None and variant not in variants:
            continue
        lines = [f"`{results['op']}` {variant}, {dtype}, microseconds:", "", line(head)]
        lines.append(line(["---", *["---:"] * (len(head) - 1)]))
        for cells in group.values():
            first = next(iter(cells.values()))
            ours = next((r for r in cells.values() if r["ours"] and "median_us" in r), None)
            found = against_best(cells)
            ratio = f"{1 / found[0]:.2f} ({found[1]})" if found else "-"
            of_copy = f"{ours['of_copy']:.2f}" if ours else "-"
            times = [_us(cells.get(name)) for name in names]
            lines.append(line([first["size"], *times, _band(ours), of_copy, ratio]))
        parts.append("\n".join(lines))
    machine = where(results)
    return "\n\n".join(
        [*parts, f"{machine[0].upper()}{machine[1:]}. {worst(results).capitalize()}."]
    )


def line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def main(given: list[str] | None = None) -> int:
    """Print a results file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true", help="tables as README has them")
    asked = parser.parse_args(given)
    try:
        results = read(asked.file)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    print(markdown(results) if asked.markdown else summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
