"""Every op under pytest-benchmark: `pytest bench/`, results by `--benchmark-json FILE`.

The contenders of a cell are measured together, round by round, when the first of them comes up;
pytest-benchmark then gets each one's own samples through a clock that plays them back. So its
statistics, groups and comparisons work, and no contender had the machine to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.cases import Cell
from bench.contenders import Contender, contenders
from bench.measure import Row, measure
from bench.subject import OPS, subject

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 2.0  # for the rounds of one cell on a CPU, beyond the first few

pytestmark = [
    # torch's own, raised while Inductor is imported
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

_measured: dict[Cell, dict[str, Row]] = {}


class Playback:
    """A clock that, read before and after, shows that the next recorded sample has passed."""

    def __init__(self) -> None:
        self.samples: Iterator[float] = iter(())
        self._reading = False

    def __call__(self) -> float:
        self._reading = not self._reading
        return 0.0 if self._reading else next(self.samples)


CLOCK = Playback()


def cells(every: bool) -> list[Cell]:
    """The cells in the order of the report: contenders of a cell stand together.

    On a CPU, the ops that have a backend for one.
    """
    found = []
    for op in OPS:
        of = subject(op)
        if not any(c.ours for c in contenders(of, DEVICE)):
            continue
        dtypes = ("float32", "bfloat16") if DEVICE == "cpu" else ("bfloat16",)
        found += [
            Cell.of(op, shape, dtype, variant)
            for shape in (of.cpu if DEVICE == "cpu" else of.gpu)
            for dtype in dtypes
            for variant in of.variants_of(shape)
            # one model shows what the other forms cost; the rest takes minutes to compile
            if every or variant.form == of.forms[0] or shape.name == "llama_1b"
        ]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = cells(metafunc.config.getoption("--cells") == "all")
        pairs = [(cell, one) for cell in chosen for one in contenders(cell.subject, DEVICE)]
        ids = [f"{cell}-{contender.name}".replace(" ", "_") for cell, contender in pairs]
        metafunc.parametrize(("cell", "contender"), pairs, ids=ids)


def rows_of(cell: Cell) -> dict[str, Row]:
    """The cell's rows by contender, measured once."""
    if cell not in _measured:
        everyone = contenders(cell.subject, DEVICE)
        rows = measure(cell, DEVICE, everyone, seconds=SECONDS)
        _measured[cell] = {row["backend"]: row for row in rows}
    return _measured[cell]


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, cell: Cell, contender: Contender) -> None:
    if contender.absent:
        pytest.skip(f"{contender.name}: {contender.absent}")
    row = rows_of(cell)[contender.name]
    if row.get("error"):
        pytest.fail(f"{contender.name} on {cell}: {row['error']}")
    benchmark.group = str(cell)
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples_us"})
    CLOCK.samples = iter([s * 1e-6 for s in row["samples_us"]])
    benchmark.pedantic(lambda: None, rounds=len(row["samples_us"]))
