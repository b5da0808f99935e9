"""Which registers each partition of a warp-specialised kernel may use, and which it does.

Partitions are one program: every warp starts with the registers that the launch gives, and each
group of four takes or returns some (setmaxnreg) before its part begins. What belongs to whom is
seen by following every jump from the kernel's start.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from support.overlap import Instruction, count, follow, parse

_LIMIT = re.compile(r"USETMAXREG\.\S+ (?:UP\d, )?0x([0-9a-f]+)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_ACCUMULATOR = re.compile(r"[HQ]GMMA\.\d+x(\d+)x\d+\.F(16|32)\S* R(\d+)")
_WORK = ("HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "UTMAREDG")


@dataclass(frozen=True)
class Partition:
    """The code that runs between one setmaxnreg and the next, where it copies or multiplies."""

    limit: int
    used: int
    instructions: int
    matrix: int
    copies: int
    spills: int

    def __str__(self) -> str:
        return (
            f"{self.used} of {self.limit} registers, {self.instructions} instructions, "
            f"{self.matrix} matrix, {self.copies} TMA, {self.spills} spills"
        )


def partitions(sass: str, registers: int) -> list[Partition]:
    """The partitions of a kernel that starts with `registers` a thread, in order of address."""
    lines, labels = parse(sass)
    found = []
    for start, at in sorted(_regions(lines, labels).items()):
        body = [lines[i] for i in sorted(at)]
        texts = [line.text for line in body]
        if count(texts, *_WORK):
            limit = _LIMIT.match(lines[start].text) if start >= 0 else None
            found.append(
                Partition(
                    limit=int(limit[1], 16) if limit else registers,
                    used=max(_highest(text) for text in texts) + 1,
                    instructions=len(texts),
                    matrix=count(texts, "HGMMA", "QGMMA"),
                    copies=count(texts, "UTMALDG", "UTMASTG", "UTMAREDG"),
                    spills=count(texts, "LDL", "STL"),
                )
            )
    return found


def _regions(lines: list[Instruction], labels: dict[str, int]) -> dict[int, set[int]]:
    """Instructions by the setmaxnreg that was met last on the way to them; -1 before any."""
    regions: dict[int, set[int]] = defaultdict(set)
    ahead = [(-1, 0)]
    while ahead:
        region, at = ahead.pop()
        if at in regions[region]:
            continue
        regions[region].add(at)
        if lines[at].text.startswith("USETMAXREG"):
            region = at
        ahead += [(region, to) for to in follow(lines, labels, at)]
    return regions


def _highest(text: str) -> int:
    """The highest register that an instruction names or, being wide, reaches."""
    named = [int(n) for n in _REGISTER.findall(text)]
    if not named:
        return -1
    wide = _ACCUMULATOR.match(text)
    if wide:
        return max(*named, int(wide[3]) + int(wide[1]) * int(wide[2]) // 64 - 1)
    name = text.split(" ", 1)[0]
    reach = 3 if name.endswith((".128", ".4")) else 1 if name.endswith((".64", ".2")) else 0
    return max(named) + reach
