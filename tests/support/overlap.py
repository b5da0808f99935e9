"""Do exponentials run beside the matrix units: the order of instructions inside hot loops.

On Hopper a group of wgmma runs until its wait; what the program issues between the two costs no
time of its own. The compiler may move the wait ahead of the softmax, and nothing but the machine
code shows it: results are the same and only time is lost. `hot_loops` finds the innermost loops
that hold matrix instructions and says which share of their exponentials are issued while a group
is in flight, beside what else a kernel's author wants to know of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,6}\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z0-9_.x]+)(.*?);")
_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_TARGET = re.compile(r"\.(L_x_\d+)")
_JUMPS = ("BRA", "BRX", "CALL")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "IMMA")
_WGMMA = re.compile(r"[HQ]GMMA\.(\d+x\d+x\d+)\S* R\d+, (gdesc|R)")


class Instruction(NamedTuple):
    """One line of machine code: its text, where it may jump, and whether no predicate guards it."""

    text: str
    targets: tuple[str, ...]
    always: bool


@dataclass(frozen=True)
class Loop:
    """One innermost loop around matrix instructions."""

    instructions: int
    matrix: int
    exponentials: int
    in_flight: int  # percent of the exponentials that a running wgmma hides
    hidden: int  # percent of all other instructions that one hides
    spills: int
    copies_by_tma: int
    copies_by_threads: int
    shapes: Mapping[str, int]  # wgmma by shape and by where its first operand lies, RS or SS
    barriers: int
    shared_accesses: int  # registers to shared memory and back: a layout that is converted there

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} of {shape}" for shape, n in sorted(self.shapes.items()))
        return (
            f"{self.instructions} instructions ({self.hidden} % hidden), {self.matrix} matrix"
            f"{f' ({shapes})' * bool(shapes)}, {self.exponentials} exponentials "
            f"({self.in_flight} % in flight), {self.copies_by_tma} TMA, {self.copies_by_threads} "
            f"LDGSTS, {self.barriers} barriers, {self.shared_accesses} shared memory, "
            f"{self.spills} spills"
        )


def hot_loops(sass: str, *, waits_aside: bool = False) -> list[Loop]:
    """The innermost loops with matrix instructions and exponentials, the shortest first.

    waits_aside: waits for mbarriers stand behind the code and jump back into it, which is no loop.
    What a loop itself keeps behind the code would hide it then, so it is not asked for by others.
    """
    lines, labels = parse(sass)
    ranges = {
        (labels[t], at)
        for at, line in enumerate(lines)
        for t in line.targets
        if t in labels and (waits_aside or line.text.startswith("BRA"))
    }
    kept: list[tuple[int, int]] = []
    found: list[Loop] = []
    for start, end in sorted(ranges, key=lambda pair: pair[1] - pair[0]):
        if start > end or any(start <= s and e <= end for s, e in kept):
            continue
        if waits_aside and not _comes_round(lines, labels, start, end):
            continue
        loop = _read([line.text for line in lines[start : end + 1]])
        if loop.matrix > 1 and loop.exponentials:
            kept.append((start, end))
            found.append(loop)
    return found


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index of the one that each label stands before."""
    lines: list[Instruction] = []
    labels: dict[str, int] = {}
    for text in sass.splitlines():
        label, found = _LABEL.match(text), _INSTRUCTION.match(text)
        if label:
            labels[label[1]] = len(lines)
        elif found:
            jump = found[2].startswith(_JUMPS)
            targets = tuple(_TARGET.findall(found[3])) if jump else ()
            lines.append(Instruction(found[2] + found[3].rstrip(), targets, found[1] is None))
    return lines, labels


def follow(lines: list[Instruction], labels: dict[str, int], at: int) -> list[int]:
    """Where the program may go on after one instruction."""
    text, targets, always = lines[at]
    ahead = [labels[t] for t in targets if t in labels]
    leaves = text.startswith(("EXIT", "RET", "BRA", "BRX"))
    if at + 1 < len(lines) and not (leaves and always):
        ahead.append(at + 1)
    return ahead


def _comes_round(lines: list[Instruction], labels: dict[str, int], start: int, end: int) -> bool:
    """Is the jump back reached from its target? A wait that stands aside also jumps back."""
    seen, ahead = set(), [start]
    while ahead:
        at = ahead.pop()
        if start <= at <= end and at not in seen:
            seen.add(at)
            ahead += follow(lines, labels, at)
    return end in seen


def count(body: list[str], *prefixes: str) -> int:
    """Instructions of a body whose names begin with one of `prefixes`."""
    return sum(line.startswith(prefixes) for line in body)


def _read(body: list[str]) -> Loop:
    pending, opened = 0, False
    exponentials: list[bool] = []
    others: list[bool] = []
    for _ in range(2):  # the second turn knows what the first left running
        exponentials, others = [], []
        for line in body:
            if line.startswith(("HGMMA", "QGMMA")):
                opened = True
                if "gsb0" in line:
                    pending, opened = pending + 1, False
            elif line.startswith("WARPGROUP.DEPBAR"):
                limit = re.search(r"gsb0, 0x([0-9a-f]+)", line)
                pending = min(pending, int(limit[1], 16)) if limit else 0
            else:
                kind = exponentials if line.startswith("MUFU.EX2") else others
                kind.append(bool(pending or opened))
    return Loop(
        instructions=len(body),
        matrix=count(body, *_MATRIX),
        exponentials=len(exponentials),
        in_flight=_percent(exponentials),
        hidden=_percent(others),
        spills=count(body, "LDL", "STL"),
        copies_by_tma=count(body, "UTMALDG"),
        copies_by_threads=count(body, "LDGSTS"),
        shapes=wgmma_shapes(body),
        barriers=count(body, "BAR."),
        shared_accesses=count(body, "LDS", "STS", "STSM"),
    )


def wgmma_shapes(body: list[str]) -> dict[str, int]:
    """How many wgmma there are of each shape, their first operand in registers (RS) or not (SS)."""
    found = Counter(
        f"{one[1]} {'RS' if one[2] == 'R' else 'SS'}" for one in map(_WGMMA.match, body) if one
    )
    return dict(found)


def _percent(flags: list[bool]) -> int:
    return round(100 * sum(flags) / len(flags)) if flags else 0
