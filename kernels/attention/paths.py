"""Which kernels serve a call of backend "triton": the portable ones, or Hopper's in Gluon.

`configs/<device>.json` beside the kernels says what was measured to be faster for a pass and a pair
of head sizes, on the GPU of that name (`python -m bench.hopper` makes it). Where a table says
nothing the portable kernels run, and also where the others do not serve a call. Lengths, batches
and masks do not enter: a row's bits must not depend on them.

"gluon_fused" is a backward that makes all gradients in one pass, adding dq up by atomics: reruns
differ in its last bits, so it is never taken where torch.use_deterministic_algorithms is on, and
`bench.hopper` puts it into no table. What it does not serve goes to "gluon".

SWATHE_ATTENTION_PATH, read when swathe is imported, overrules the tables: "portable", or "gluon"
for whatever the Gluon kernels serve, or "gluon_fused", which is "gluon" for other passes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.device import arch
from swathe.kernels.core.tune import device_slug

PATHS = ("portable", "gluon", "gluon_fused")
PASSES = ("forward", "backward", "decode")
VARIABLE = "SWATHE_ATTENTION_PATH"
SCHEMA = 1
HOME = Path(__file__).parent / "configs"
Table = dict[tuple[str, int, int], str]


def _asked() -> str | None:
    given = os.environ.get(VARIABLE)
    if given is not None and given not in PATHS:
        raise ValueError(f"{VARIABLE}={given!r}; allowed: {' or '.join(PATHS)}, or unset")
    return given


_forced = _asked()


def path(which: str, q: Tensor, v: Tensor) -> str:
    """The path of one of PASSES for heads like q (..., D) and v (..., E)."""
    if _forced is not None:
        return _forced if which == "backward" or _forced == "portable" else "gluon"
    return _looked_up(which, q.shape[-1], v.shape[-1], q.device)


@lru_cache(maxsize=256)
def _looked_up(which: str, D: int, E: int, device: torch.device) -> str:
    capability = arch(device)
    if device.type != "cuda" or capability is None or not 90 <= capability < 100:
        return "portable"
    return read(HOME / f"{device_slug(device)}.json").get((which, D, E), "portable")


@contextmanager
def forced(asked: str | None) -> Iterator[None]:
    """Take this path for a while, in every thread; None is what the tables say."""
    global _forced
    before, _forced = _forced, asked
    try:
        yield
    finally:
        _forced = before


def read(file: Path) -> Table:
    """The rows of a table; no file, no rows. Raises ValueError for a file that is none."""
    if not file.is_file():
        return {}
    document = json.loads(file.read_text())
    rows = document.get("rows") if isinstance(document, dict) else None
    if rows is None or document.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} is no table of attention's paths (schema {SCHEMA}); "
            "make one with: python -m bench.hopper"
        )
    for row in rows:
        if row["pass"] not in PASSES or row["path"] not in PATHS:
            raise ValueError(f"{file}: row {row}; allowed: pass in {PASSES}, path in {PATHS}")
        if row["path"] == "gluon_fused" and row["pass"] != "backward":
            raise ValueError(f"{file}: row {row}; path gluon_fused is of pass backward alone")
    return {(row["pass"], row["D"], row["E"]): row["path"] for row in rows}


def write(file: Path, table: Table, facts: dict[str, Any]) -> None:
    """Write a table, with `facts` about the run that it comes from."""
    rows = [
        {"pass": which, "D": D, "E": E, "path": chosen}
        for (which, D, E), chosen in sorted(table.items())
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"schema": SCHEMA, **facts, "rows": rows}, indent=1) + "\n")
