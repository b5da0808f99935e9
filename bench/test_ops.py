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
from bench.cells import cells, contenders_of
from bench.contenders import Contender
from bench.measure import Row, measure
from bench.subject import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of one cell: sittings, and on a CPU seconds for the rounds of each beyond the first few
SITTINGS = {"quick": 2, "issue": 3, "all": 3}
SECONDS = {"quick": 0.3, "issue": 0.7, "all": 0.7}

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        which = _chosen(metafunc.config)
        pairs = [
            (cell, contender)
            for op in OPS
            for cell in cells(op, DEVICE, which)
            for contender in contenders_of(cell, DEVICE, which)
        ]
        ids = [f"{cell}-{contender.name}".replace(" ", "_") for cell, contender in pairs]
        metafunc.parametrize(("cell", "contender"), pairs, ids=ids)


def _chosen(config: pytest.Config) -> str:
    return str(config.getoption("--cells"))


def rows_of(cell: Cell, which: str) -> dict[str, Row]:
    """The cell's rows by contender, measured once."""
    if cell not in _measured:
        everyone = contenders_of(cell, DEVICE, which)
        rows = measure(cell, DEVICE, everyone, sittings=SITTINGS[which], seconds=SECONDS[which])
        _measured[cell] = {row["backend"]: row for row in rows}
    return _measured[cell]


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, cell: Cell, contender: Contender, pytestconfig: pytest.Config) -> None:
    if contender.absent:
        pytest.skip(f"{contender.name}: {contender.absent}")
    row = rows_of(cell, _chosen(pytestconfig))[contender.name]
    error = row.get("error", "")
    if error and contender.ours:
        pytest.fail(f"{contender.name} on {cell}: {error}")
    if error.startswith("NotImplementedError: "):
        pytest.skip(error)
    if error:
        pytest.xfail(f"{contender.name} on {cell}: {error}")  # a peer that is wrong here
    benchmark.group = str(cell)
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples_us"})
    CLOCK.samples = iter([s * 1e-6 for s in row["samples_us"]])
    benchmark.pedantic(lambda: None, rounds=len(row["samples_us"]))
