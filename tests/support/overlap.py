"""Do exponentials run beside the matrix units: the order of instructions inside hot loops.

On Hopper a group of wgmma runs until its wait; what the program issues between the two costs no
time of its own. The compiler may move the wait ahead of the softmax, and nothing but the machine
code shows it: results are the same and only time is lost. `hot_loops` finds the innermost loops
that hold matrix instructions and says which share of their exponentials are issued while a group
is in flight, beside what else a kernel's author wants to know of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z0-9_.x]+)(.*?);")
_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "IMMA")


@dataclass(frozen=True)
class Loop:
    """One innermost loop around matrix instructions."""

    instructions: int
    matrix: int
    exponentials: int
    in_flight: int  # percent of the exponentials that a running wgmma hides
    spills: int
    copies_by_tma: int

    def __str__(self) -> str:
        return (
            f"{self.instructions} instructions, {self.matrix} matrix, {self.exponentials} "
            f"exponentials ({self.in_flight} % in flight), {self.copies_by_tma} TMA, "
            f"{self.spills} spills"
        )


def hot_loops(sass: str) -> list[Loop]:
    """The innermost loops with matrix instructions and exponentials, the shortest first."""
    lines, labels = _parse(sass)
    ranges = {(labels[t], at) for at, (_, t) in enumerate(lines) if t in labels}
    kept: list[tuple[int, int]] = []
    found: list[Loop] = []
    for start, end in sorted(ranges, key=lambda pair: pair[1] - pair[0]):
        if start > end or any(start <= s and e <= end for s, e in kept):
            continue
        loop = _read([line for line, _ in lines[start : end + 1]])
        if loop.matrix > 1 and loop.exponentials:
            kept.append((start, end))
            found.append(loop)
    return found


def _parse(sass: str) -> tuple[list[tuple[str, str | None]], dict[str, int]]:
    lines: list[tuple[str, str | None]] = []
    labels: dict[str, int] = {}
    for text in sass.splitlines():
        label, instruction = _LABEL.match(text), _INSTRUCTION.match(text)
        if label:
            labels[label[1]] = len(lines)
        elif instruction:
            target = _TARGET.search(instruction[2]) if instruction[1].startswith("BRA") else None
            lines.append((instruction[1] + instruction[2], target[1] if target else None))
    return lines, labels


def _read(body: list[str]) -> Loop:
    pending, opened = 0, False
    exponentials: list[bool] = []
    for _ in range(2):  # the second turn knows what the first left running
        exponentials = []
        for line in body:
            if line.startswith(("HGMMA", "QGMMA")):
                opened = True
                if "gsb0" in line:
                    pending, opened = pending + 1, False
            elif line.startswith("WARPGROUP.DEPBAR"):
                limit = re.search(r"gsb0, 0x([0-9a-f]+)", line)
                pending = min(pending, int(limit[1], 16)) if limit else 0
            elif line.startswith("MUFU.EX2"):
                exponentials.append(bool(pending or opened))
    return Loop(
        instructions=len(body),
        matrix=_count(body, *_MATRIX),
        exponentials=len(exponentials),
        in_flight=round(100 * sum(exponentials) / len(exponentials)) if exponentials else 0,
        spills=_count(body, "LDL", "STL"),
        copies_by_tma=_count(body, "UTMALDG"),
    )


def _count(body: list[str], *prefixes: str) -> int:
    return sum(line.startswith(prefixes) for line in body)
