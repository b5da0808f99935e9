"""The gate on kernels written in Gluon for Hopper: one partition copies, others multiply.

Such a kernel is only worth its length where exponentials run beside the matrix units, registers
suffice, and the operands lie where the kernel put them, so these are rules and not baselines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock

from support.fake_driver import fake_gpu
from support.machine_code import SHARED_MEMORY, GluonCode, read_gluon
from swathe.kernels.core.launch import Launcher

_REGISTERS = 65_536  # of a multiprocessor
_ONE_DEVICE = Lock()


def launched(kernel: str, call: Callable[[], object]) -> GluonCode:
    """The code of the one kernel of this name that `call` launches on a Hopper that is not here."""
    with _ONE_DEVICE, fake_gpu("sm_90"):
        call()
        launchers = list(Launcher._made)
        compiled = [c for at in launchers for c in at._compiled.values() if c.name == kernel]
    assert len(compiled) == 1, f"{len(compiled)} kernels called {kernel}"
    return read_gluon(compiled[0])


def wgmma(*products: tuple[int, int, str]) -> dict[str, int]:
    """What products of 64 rows take: numbers summed over, width, and where the rows lie."""
    found: Counter[str] = Counter()
    for depth, width, operand in products:
        found[f"64x{width}x16 {operand}"] += depth // 16
    return dict(found)


@dataclass(frozen=True)
class GluonConfiguration:
    """One specialisation of a Gluon kernel that ships.

    `build` compiles it: `launched` for what a launcher runs. `loops` is the number of hot loops,
    since one that is unrolled away or split would otherwise go unseen; each must hold one of
    `matrix`, which are numbers of wgmma by shape and operand ({"64x128x16 RS": 8}). `in_flight` is
    the least percentage of a loop's exponentials beside them, `shared_accesses` the most exchanges
    through shared memory in a loop, `spilled` the most bytes altogether, `spilled_in_loops` the
    most instructions for them in a loop, which is none but for good reasons, `copies` the TMA
    instructions by name.
    """

    label: str
    build: Callable[[], GluonCode]
    loops: int
    matrix: tuple[Mapping[str, int], ...]
    in_flight: int = 95
    shared_accesses: int = 0
    spilled: int = 0
    spilled_in_loops: int = 0
    copies: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = ("sm_90",)

    def __str__(self) -> str:
        return self.label

    def compile(self, target: str) -> GluonCode:
        """Compile for `target`, which is sm_90."""
        assert target == "sm_90", target
        return self.build()

    def faults(self, code: GluonCode, target: str) -> list[str]:
        """The rules that `code` breaks."""
        found = list(code.serialised)
        found += ["fp64 arithmetic"] * code.double_arithmetic
        if code.shared > SHARED_MEMORY[target]:
            found.append(f"{code.shared} bytes of shared memory")
        if code.registers * code.threads > _REGISTERS:
            found.append(f"{code.threads} threads cannot start with {code.registers} registers")
        if code.spilled > self.spilled:
            found.append(f"{code.spilled} bytes spilled, {self.spilled} allowed")
        found += [
            f"partition uses more registers than it has: {p}"
            for p in code.partitions
            if p.used > p.limit
        ]
        if code.copies.get("LDGSTS"):
            found.append("threads copy what the tensor-memory accelerator should")
        found += [
            f"{code.copies.get(name, 0)} {name}, expected {n}"
            for name, n in self.copies.items()
            if code.copies.get(name, 0) != n
        ]
        return found + self._faults_of_loops(code)

    def _faults_of_loops(self, code: GluonCode) -> list[str]:
        found = []
        if len(code.loops) != self.loops:
            found.append(f"{len(code.loops)} hot loops, expected {self.loops}")
        for loop in code.loops:
            if loop.spills > self.spilled_in_loops:
                found.append(f"spills in a loop: {loop}")
            if loop.in_flight < self.in_flight:
                found.append(f"exponentials that nothing hides: {loop}")
            if dict(loop.shapes) not in [dict(m) for m in self.matrix]:
                found.append(f"matrix instructions other than {self.matrix}: {loop}")
            if loop.shared_accesses > self.shared_accesses:
                found.append(f"a layout is converted through shared memory: {loop}")
        return found

    def facts(self, code: GluonCode, target: str) -> dict[str, int]:
        """What the baseline keeps: the loops of tiles without masks are the shortest."""
        loops = code.loops
        return {
            "shared": code.shared,
            "spilled": code.spilled,
            "spilled_in_loops": max(loop.spills for loop in loops),
            "registers": max(p.used for p in code.partitions),
            "instructions": loops[0].instructions,
            "longest": loops[-1].instructions,
            "barriers": max(loop.barriers for loop in loops),
            "in_flight": min(loop.in_flight for loop in loops),
        }
