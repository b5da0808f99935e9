"""What `verify` found: one row a comparison, printed worst first."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1
_NAMED = 5  # of the unused modules, in print


class VerificationError(AssertionError):
    """A model is not what its reference is; the message lists every failure."""


@dataclass(frozen=True)
class Check:
    """One comparison with the reference.

    `kind` is "output", "loss", "gradient", "padding" or "parameter", and `name` says of what.
    `error` and `own` are the distances of the model and of its reference from the yardstick,
    relative to its rms; None where there is nothing to measure. `failure` is None for a pass.
    """

    kind: str
    name: str
    error: float | None = None
    own: float | None = None
    failure: str | None = None

    @property
    def ratio(self) -> float | None:
        """The model's error in units of its reference's own; below 1 the model is more exact."""
        if self.error is None or self.own is None:
            return None
        if self.own == 0.0:
            return 1.0 if self.error == 0.0 else float("inf")
        return self.error / self.own


@dataclass(frozen=True)
class Verification:
    """Every check, in the model's order. True if all of them passed; printing it gives a table.

    `unused` are patched modules, "path (op)", that no kernel served on this batch: it does not
    reach them, as text does no vision tower, or calls them in a way that is for their own forward.
    """

    checks: tuple[Check, ...]
    reference: str
    yardstick: str
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.failure is not None)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def __bool__(self) -> bool:
        return self.ok

    def raise_for_errors(self) -> None:
        """Raise VerificationError, with every failure, unless all checks passed."""
        if self.failures:
            lines = [f"{check.kind} {check.name}: {check.failure}" for check in self.failures]
            raise VerificationError(
                f"{len(lines)} of {len(self.checks)} checks failed against {self.reference}:\n"
                + "\n".join(lines)
            )

    def worst_first(self) -> tuple[Check, ...]:
        """The checks: failures, then by ratio, then those without one."""

        def order(check: Check) -> tuple[bool, float]:
            ratio = check.ratio
            return check.failure is None, -1.0 if ratio is None else -ratio

        return tuple(sorted(self.checks, key=order))

    def to_dict(self) -> dict[str, Any]:
        """Plain objects that json can write; numbers that are not finite are text."""
        rows = [{**asdict(check), "ratio": check.ratio} for check in self.checks]
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "reference": self.reference,
            "yardstick": self.yardstick,
            "checks": [{key: _plain(value) for key, value in row.items()} for row in rows],
            "notes": list(self.notes),
            "unused": list(self.unused),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        table = [("check", "name", "error", "reference's", "ratio", "failure")]
        for check in self.worst_first():
            numbers = (_short(check.error), _short(check.own), _short(check.ratio))
            table.append((check.kind, check.name, *numbers, check.failure or ""))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        failed = f"{len(self.failures)} of {len(self.checks)} checks failed"
        total = f"{failed}, against {self.reference}; errors are distances from {self.yardstick}"
        return "\n".join([*lines, total, *self.notes, *self._unused()])

    def _unused(self) -> list[str]:
        if not self.unused:
            return []
        rest = len(self.unused) - _NAMED
        more = f" and {rest} more" if rest > 0 else ""
        names = ", ".join(self.unused[:_NAMED])
        return [f"patched, yet served by no kernel of swathe on this batch: {names}{more}"]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _plain(value: Any) -> Any:
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else str(value)
