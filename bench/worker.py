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
from bench.cases import Cell
from bench.contenders import contenders
from bench.launch_cost import host_rows
from bench.measure import SITTINGS, measure
from bench.subject import subject

Row = dict[str, Any]
Unit = dict[str, Any]


def probe(unit: Unit) -> Iterator[Row]:
    """One kernel on a small problem, forward and backward: does it compile, run and come back."""
    of = subject(unit["op"])
    problem = parity.drawn(of, unit["device"], of.probes[unit["probe"]], 0, unit["form"])
    parity.run_of(of, unit["backend"], problem)()
    if unit["device"] == "cuda":
        torch.cuda.synchronize()
    yield {"check": unit["name"], "backend": unit["backend"], "result": "ok"}


def contract(unit: Unit) -> Iterator[Row]:
    """Parity rows of one dtype and group."""
    arguments = (unit["op"], unit["backend"], unit["device"], unit["dtype"])
    if unit["shapes"] == "edges":
        yield from parity.parity_on_edges(*arguments, unit["group"])
    else:
        yield from parity.parity_on(*arguments, unit["shapes"])


def check(unit: Unit) -> Iterator[Row]:
    """One check of parity.py, or the reason why it cannot run here."""
    of, reason = subject(unit["op"]), _why_not(unit)
    where = (unit["backend"], unit["device"])
    if reason is not None:
        result = f"not run: {reason}"
    else:
        with parity.poisoned():
            if unit["check"] in of.more:
                result = of.more[unit["check"]](*where, unit["dry"])
            elif unit["check"] == "huge":
                assert of.huge is not None
                result = of.huge(*where, unit["dry"])
            else:
                shape = of.shape(unit["shape"])
                result = parity.CHECKS[unit["check"]](of, *where, shape, unit["dry"])
    yield {"check": unit["name"], "backend": unit["backend"], "result": result}


def _why_not(unit: Unit) -> str | None:
    if unit["device"] != "cuda":
        return "needs a GPU" if unit["gpu_only"] else None
    free, needed = torch.cuda.mem_get_info()[0], unit["bytes"]
    return None if free >= needed else f"{free >> 30} GiB are free, {needed >> 30} are needed"


def bench(unit: Unit) -> Iterator[Row]:
    """All variants of one shape and dtype, every contender beside the others."""
    of, device = subject(unit["op"]), unit["device"]
    chosen = contenders(of, device, compiled=unit["compiled"])
    chosen = [c for c in chosen if c.name not in unit["without"]]
    shape = of.shape(unit["shape"])
    for variant in of.variants_of(shape):
        cell = Cell.of(of.op, shape, unit["dtype"], variant)
        sittings = 1 if unit["rounds"] else SITTINGS[device]
        yield from measure(cell, device, chosen, sittings=sittings, rounds=unit["rounds"])
        if device == "cuda":
            torch.cuda.empty_cache()


def host(unit: Unit) -> Iterator[Row]:
    """Host microseconds of each way to call the op."""
    of = subject(unit["op"])
    where = (of.shape(unit["shape"]), unit["backend"], unit["device"])
    yield from host_rows(of, *where, rounds=unit["rounds"])


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
