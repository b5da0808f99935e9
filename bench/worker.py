"""The process that does units of work, one after another, and says so line by line.

    python -m bench.worker UNITS.json LOG.jsonl

A unit is {"id", "kind", ...}. Before a unit the log gets {"id", "state": "start"}, for every row
{"id", "state": "row", "row"}, and after it {"id", "state": "done"}. Nothing is caught here: a unit
that raises or hangs ends this process, bench.lanes records it and starts another one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import parity
from bench.cases import NAMED, VARIANTS, Cell, draw
from bench.contenders import contenders
from bench.launch_cost import host_rows
from bench.measure import measure
from swathe.kernels.norm.shapes import Shape

Row = dict[str, Any]
Unit = dict[str, Any]


def probe(unit: Unit) -> Iterator[Row]:
    """One kernel on a tiny problem, forward and backward: does it compile, run and come back."""
    shape = Shape("probe", unit["M"], unit["N"])
    kind = parity.FULL if unit["residual"] else parity.PLAIN
    parity.run_of(unit["backend"], draw(Cell.of(shape, "bfloat16", kind), unit["device"], 0))()
    if unit["device"] == "cuda":
        torch.cuda.synchronize()
    yield {"check": unit["name"], "backend": unit["backend"], "result": "ok"}


def contract(unit: Unit) -> Iterator[Row]:
    """Parity rows of one dtype and casting."""
    arguments = (unit["backend"], unit["device"], unit["dtype"], unit["casting"])
    if unit["shapes"] == "edges":
        yield from parity.parity_on_edges(*arguments)
    else:
        yield from parity.parity_on(*arguments, tuple(unit["shapes"]))


def check(unit: Unit) -> Iterator[Row]:
    """One check of parity.py, or the reason why it cannot run here."""
    reason = _why_not(unit)
    if reason is None:
        function: Callable[..., str] = getattr(parity, unit["function"])
        arguments = unit["arguments"]
        if "shape" in arguments:
            arguments = {**arguments, "shape": Shape(*arguments["shape"])}
        with parity.poisoned():
            result = function(unit["backend"], unit["device"], **arguments)
    else:
        result = f"not run: {reason}"
    yield {"check": unit["name"], "backend": unit["backend"], "result": result}


def _why_not(unit: Unit) -> str | None:
    if unit["device"] != "cuda":
        return "needs a GPU" if unit["gpu_only"] else None
    free, needed = torch.cuda.mem_get_info()[0], unit.get("bytes", 0)
    return None if free >= needed else f"{free >> 30} GiB are free, {needed >> 30} are needed"


def bench(unit: Unit) -> Iterator[Row]:
    """All variants of one shape and dtype, every contender beside the others."""
    chosen = contenders(unit["device"], compiled=unit["compiled"])
    chosen = [c for c in chosen if c.name not in unit["without"]]
    for variant in VARIANTS:
        cell = Cell.of(NAMED[unit["shape"]], unit["dtype"], variant)
        yield from measure(cell, unit["device"], chosen, rounds=unit["rounds"])
        if unit["device"] == "cuda":
            torch.cuda.empty_cache()


def host(unit: Unit) -> Iterator[Row]:
    """Host microseconds of each way to call the op."""
    yield from host_rows(NAMED[unit["shape"]], unit["backend"], unit["device"])


KINDS: dict[str, Callable[[Unit], Iterator[Row]]] = {
    "probe": probe,
    "parity": contract,
    "check": check,
    "bench": bench,
    "host": host,
}


def main(units: Path, log: Path) -> None:
    """Do the units of one file and write the log."""
    with log.open("a") as lines:
        for unit in json.loads(units.read_text()):
            _say(lines, id=unit["id"], state="start")
            for row in KINDS[unit["kind"]](unit):
                _say(lines, id=unit["id"], state="row", row=row)
            _say(lines, id=unit["id"], state="done")


def _say(lines: Any, **line: Any) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
