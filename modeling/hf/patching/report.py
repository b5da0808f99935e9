"""What finders hand over (Candidate, Proof), and what users read (Row, Report)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from swathe.modeling.hf.patching.swaps import Undo

SCHEMA = 1


@dataclass(frozen=True)
class Proof:
    """What a comparison with the module's own forward found.

    `error` is the largest ratio, over outputs and gradients, of our rms error to the module's own;
    `where` the output or gradient it was found in. `failure` says what is wrong, None for a pass.
    """

    error: float
    where: str
    failure: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One module that may be patched.

    `path` is its name in the model ("" for the model itself) and `op` the op that would serve it.
    With a `reason` it is left alone. Otherwise `prove` is called, and if the proof holds, `apply`
    with the ledger that every change goes through. Candidates with one `key` share one proof:
    it holds whatever the proof depends on (class, code, dtype, device, sizes, numbers read). The
    engine adds the backend's name.
    """

    path: str
    module: nn.Module
    op: str
    backend: str = ""
    reason: str | None = None
    key: Hashable = None
    prove: Callable[[], Proof] | None = None
    apply: Callable[[Undo], None] | None = None


@dataclass(frozen=True)
class Row:
    """One candidate's outcome. `error` is Proof.error, None where nothing was proven."""

    path: str
    module: str
    op: str
    backend: str
    action: Literal["patched", "left"]
    error: float | None
    reason: str

    @property
    def patched(self) -> bool:
        """Whether the module runs our kernel now."""
        return self.action == "patched"


@dataclass(frozen=True)
class Report:
    """What `patch` did: every candidate in the model's order. Printing it gives a table."""

    rows: tuple[Row, ...]
    note: str = ""

    @property
    def patched(self) -> tuple[Row, ...]:
        """The rows of what was swapped."""
        return tuple(row for row in self.rows if row.patched)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of what was left alone, each with its reason."""
        return tuple(row for row in self.rows if not row.patched)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many were patched and left, by op."""
        found: dict[str, Counter[str]] = {}
        for row in self.rows:
            found.setdefault(row.op, Counter(patched=0, left=0))[row.action] += 1
        return {op: dict(n) for op, n in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain objects that json can write."""
        return {
            "schema": SCHEMA,
            "counts": self.counts(),
            "rows": [asdict(row) for row in self.rows],
            "note": self.note,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            where = row.path and re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", row.path)
            key = (where, row.module, row.op, row.backend, row.action, row.reason)
            groups.setdefault(key, []).append(row)
        header = ("path", "count", "module", "op", "backend", "action", "error", "reason")
        table: list[tuple[str, ...]] = [header]
        for (where, module, op, backend, action, reason), rows in groups.items():
            errors = [row.error for row in rows if row.error is not None]
            error = f"{max(errors):.2f}" if errors else ""
            table.append(
                (where or "(the model)", str(len(rows)), module, op, backend, action, error, reason)
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        total = f"{len(self.patched)} patched, {len(self.left)} left alone"
        return "\n".join([*lines, total + (f"; {self.note}" if self.note else "")])
