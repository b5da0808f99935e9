"""The gate on machine code: what every shipped configuration must reach, and committed baselines.

A test module in tests/offline lists `CONFIGURATIONS`; `verify` compiles one and fails on spills,
fp64 arithmetic, more bytes moved than the minimum, and on anything worse than the baseline that
was written for this version of Triton:

    cd tests && python -m support.gate rms_norm          # tests/offline/baselines/rms_norm.json
    cd tests && python -m support.gate rms_norm --show LABEL            # facts of some, in words
    cd tests && python -m support.gate --compare HEAD    # what changed in all of them
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import triton

from support import proxies
from support.machine_code import SHARED_MEMORY, TARGETS, MachineCode, compile_for
from support.proxies import MORE_IS_BETTER

OFFLINE = Path(__file__).parents[1] / "offline"
_BASELINES = OFFLINE / "baselines"
TRITON = ".".join(triton.__version__.split(".")[:2])
# registers of one multiprocessor (of one SIMD for AMD's 64-wide waves) and warps it can hold
_REGISTERS = {"cuda": (65_536, 32, 64), "hip": (512 * 64, 64, 8)}


class Gated(Protocol):
    """What the gate asks of a configuration, whatever language its kernel is written in."""

    @property
    def label(self) -> str: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def compile(self, target: str) -> Any: ...

    def faults(self, code: Any, target: str) -> list[str]: ...

    def facts(self, code: Any, target: str) -> dict[str, int]: ...


@dataclass(frozen=True)
class Configuration:
    """One specialisation that ships.

    `types`, `constants`, `divisible` and `warps` are `compile_for`'s. `reads` and `writes` are the
    fewest bytes that a program can load and store, each instruction counted once: inputs and
    outputs of its tile (of one iteration where it loops). `wide` demands 16-byte accesses, though
    not on targets in `narrow`, whose many threads have less than that each. `wave_warps` is what
    the launcher takes where warps are 64 lanes wide, if not `warps`; `stages` are those of NVIDIA's
    GPUs, if not Triton's own; `targets` those that it ships for.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    warps: int
    reads: int | None = None
    writes: int | None = None
    wide: bool = True
    narrow: tuple[str, ...] = ()
    wave_warps: int | None = None
    stages: int | None = None
    targets: tuple[str, ...] = tuple(TARGETS)

    def warps_on(self, target: str) -> int:
        """Warps of a program on `target`."""
        wave = TARGETS[target].warp_size == 64
        return self.wave_warps if wave and self.wave_warps is not None else self.warps

    def __str__(self) -> str:
        return self.label

    def compile(self, target: str) -> MachineCode:
        """Compile for `target`, a key of TARGETS."""
        known = set(self.divisible)
        return compile_for(
            self.kernel,
            target,
            dict(self.types),
            dict(self.constants),
            known,
            self.warps_on(target),
            self.stages if TARGETS[target].backend == "cuda" else None,
        )

    def faults(self, code: MachineCode, target: str) -> list[str]:
        """The absolute rules that `code` breaks."""
        found = [f"{code.spilled} bytes spilled at {code.registers} registers"] * bool(code.spilled)
        found += ["fp64 arithmetic"] * code.double_arithmetic
        if code.shared > SHARED_MEMORY[target]:
            found.append(f"{code.shared} bytes of shared memory")
        threads = self.warps_on(target) * TARGETS[target].warp_size
        for what, widths, least in (
            ("loads", code.loads, self.reads),
            ("stores", code.stores, self.writes),
        ):
            # threads of a tile smaller than the program repeat each other's accesses
            moved = threads * sum(width // 8 * n for width, n in widths.items())
            if least is not None and moved > max(least, 16 * threads):
                found.append(f"{what} {moved} bytes a program, least {least}")
            if self.wide and target not in self.narrow and widths and not widths.get(128):
                found.append(f"{what} without a 16-byte access: {widths}")
        return found

    def facts(self, code: MachineCode, target: str) -> dict[str, int]:
        """What the baseline keeps."""
        return facts(code, target, self.warps_on(target))


def occupancy(code: MachineCode, target: str, warps: int) -> int:
    """Warps of this kernel that one multiprocessor's registers hold at once."""
    registers, lanes, most = _REGISTERS[TARGETS[target].backend]
    granule = 8 * lanes
    each = max(1, -(-code.registers * lanes // granule) * granule)
    if TARGETS[target].backend == "hip":
        return min(most, registers // each)
    return min(most, registers // each) // warps * warps


def facts(code: MachineCode, target: str, warps: int) -> dict[str, int]:
    """What the baseline keeps of one compiled configuration."""
    found = {
        "occupancy": occupancy(code, target, warps),
        "shared": code.shared,
        "loads": sum(code.loads.values()),
        "stores": sum(code.stores.values()),
    }
    loops = code.loops
    if loops:
        # the shortest is the one that runs most: tiles that need no mask
        found["instructions"] = loops[0].instructions
        if target == "sm_90":
            found["in_flight"] = loops[0].in_flight
    return found


def verify(op: str, configuration: Gated, target: str) -> None:
    """Fail where the compiled configuration breaks an absolute rule or worsens its baseline."""
    code = configuration.compile(target)
    faults = configuration.faults(code, target)
    assert not faults, "; ".join(faults)
    known = _baseline(op).get(TRITON, {}).get(f"{configuration.label} {target}")
    if known is None:
        return
    now = configuration.facts(code, target)
    worse = [
        f"{k}: {now[k]}, baseline {known[k]}"
        for k in known
        if (now[k] < known[k] if k in MORE_IS_BETTER else now[k] > known[k])
    ]
    assert not worse, "; ".join(worse)


def covered(op: str, configurations: Sequence[Gated]) -> list[str]:
    """Configurations without a baseline for this Triton, if any op has one: none is left out."""
    known = _baseline(op).get(TRITON)
    if known is None and not any(TRITON in _baseline(p.stem) for p in _BASELINES.glob("*.json")):
        return []
    known = known or {}
    labels = {f"{c.label} {target}" for c in configurations for target in c.targets}
    return sorted(labels ^ known.keys())


def _baseline(op: str) -> dict[str, dict[str, dict[str, int]]]:
    path = _BASELINES / f"{op}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def configurations_of(op: str) -> list[Gated]:
    """Those of tests/offline/test_<op>_code.py."""
    path = OFFLINE / f"test_{op}_code.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIGURATIONS


def show(op: str, part: str) -> None:
    """Print what is known of the configurations whose labels contain `part`."""
    chosen = [c for c in configurations_of(op) if part in c.label]
    assert chosen, f"no label of {op} contains {part!r}: {[c.label for c in configurations_of(op)]}"
    for configuration in chosen:
        for target in configuration.targets:
            code = configuration.compile(target)
            print(f"{configuration.label} {target}", code, sep="\n")
            for fault in configuration.faults(code, target):
                print(f"FAULT {fault}")


def write(op: str) -> None:
    """Compile every configuration of an op and keep its facts."""
    pairs = [(c, target) for c in configurations_of(op) for target in c.targets]
    with ThreadPoolExecutor(2) as pool:
        codes = pool.map(lambda pair: pair[0].compile(pair[1]), pairs)
        rows = {
            f"{c.label} {target}": c.facts(code, target)
            for (c, target), code in zip(pairs, codes, strict=True)
        }
    known = {**_baseline(op), TRITON: rows}
    versions = [
        f' "{version}": {{\n' + ",\n".join(_lines(rows)) + "\n }"
        for version, rows in sorted(known.items())
    ]
    out = _BASELINES / f"{op}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    print(f"{out}: {len(rows)} configurations for triton {TRITON}")


def _lines(rows: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(rows.items())]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        sys.exit(proxies.main(sys.argv[2:]))
    if sys.argv[2:3] == ["--show"]:
        show(sys.argv[1], "".join(sys.argv[3:]))
    else:
        for name in sys.argv[1:] or sys.exit(__doc__):
            write(name)
