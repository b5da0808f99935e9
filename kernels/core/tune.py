"""Block sizes: a tuned row where a table has one, else the heuristic beside the kernel.

Tables are JSON, one a device, in `configs/` beside the op's kernels; `python -m swathe tune` makes
them. Nothing is ever tuned inside a step. What a table may say is keyed by row length, element size
and device alone, never by the number of rows: results stay the same in any batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.launch import next_power_of_2

SCHEMA = 1


class Blocks(NamedTuple):
    """Rows and columns of a tile, and the warps that work on it."""

    rows: int
    columns: int
    warps: int


class Tunable:
    """The block sizes of one kernel, for rows of N features.

    `heuristic(N)` serves wherever no table does. `candidates(N)` are what the tuner tries and a
    table may name: every one of them must be right for N.
    """

    def __init__(
        self,
        op: str,
        kernel: str,
        heuristic: Callable[[int], Blocks],
        candidates: Callable[[int], Sequence[Blocks]],
    ) -> None:
        self.op, self.kernel = op, kernel
        self.heuristic, self.candidates = heuristic, candidates
        self._home = Path(str(sys.modules[heuristic.__module__].__file__)).parent / "configs"
        self._chosen: dict[tuple[int, int, torch.device], Blocks] = {}
        self._forced: Blocks | None = None
        tunables.setdefault(op, {})[kernel] = self

    def __call__(self, N: int, x: Tensor) -> Blocks:
        """Blocks for rows of N features like those of `x`."""
        if self._forced is not None:
            return self._forced
        key = (N, x.element_size(), x.device)
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._look_up(*key)
        return found

    def _look_up(self, N: int, itemsize: int, device: torch.device) -> Blocks:
        if device.type != "cuda":
            return self.heuristic(N)
        table = _loaded.get(self.op) or read(self._home / f"{device_slug(device)}.json")
        row = table.get((self.kernel, next_power_of_2(N), itemsize))
        # a table of another version may name blocks that this kernel does not take
        return row if row is not None and row in self.candidates(N) else self.heuristic(N)

    @contextmanager
    def forced(self, blocks: Blocks) -> Iterator[None]:
        """Use these blocks for a while, whatever the table says."""
        self._forced = blocks
        try:
            yield
        finally:
            self._forced = None

    def forget(self) -> None:
        """Look rows up again at the next call."""
        self._chosen.clear()


def around(blocks: Blocks, *, taller: bool = True) -> tuple[Blocks, ...]:
    """The usual candidates: the same tile with half and twice the warps, and twice the rows."""
    rows, columns, warps = blocks
    counts = [w for w in (warps // 2, warps, 2 * warps) if 1 <= w <= 32]
    heights = (rows, 2 * rows) if taller and 2 * rows * columns <= 8192 else (rows,)
    return tuple(Blocks(height, columns, w) for height in heights for w in counts)


Table = dict[tuple[str, int, int], Blocks]
tunables: dict[str, dict[str, Tunable]] = {}
_loaded: dict[str, Table] = {}


@lru_cache
def device_slug(device: torch.device) -> str:
    """A GPU's name as a file's: "nvidia_h200"."""
    name = torch.cuda.get_device_name(device).lower()
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def read(path: Path) -> Table:
    """The rows of a table; no file, no rows. Raises ValueError for a file that is none."""
    if not path.is_file():
        return {}
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} is no table of tuned blocks (schema {SCHEMA}); "
            "make one with: python -m swathe tune"
        )
    return {
        (row["kernel"], row["columns_up_to"], row["itemsize"]): Blocks(*row["blocks"])
        for row in document["rows"]
    }


def use(op: str, table: Table) -> None:
    """Take an op's blocks from this table, on every device, until the process ends."""
    _loaded[op] = table
    for tunable in tunables.get(op, {}).values():
        tunable.forget()
