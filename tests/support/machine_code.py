"""Compile a kernel for a GPU that is not here, and read what the machine code says.

For NVIDIA targets the cubin is disassembled with the tools that Triton ships; for AMD the assembly
text is read. Spills, register counts, widths of global accesses and fp64 arithmetic are facts of
the code that will run; time is not among them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_manager

from support.overlap import Loop, hot_loops
from support.partitions import Partition, partitions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes that one program may hold
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_DOUBLE_SASS = r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.R\w+64H|[FI]2F\.[\w.]*F64)\b"
_DOUBLE_AMDGCN = r"\bv_\w*f64\w*\b"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel does: registers a thread, bytes spilled, accesses by bit width."""

    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    double_arithmetic: bool
    sass: str = field(default="", repr=False)

    @property
    def loops(self) -> list[Loop]:
        """Loops around matrix instructions; none on AMD, whose text is another."""
        return hot_loops(self.sass)


@dataclass(frozen=True)
class GluonCode(MachineCode):
    """What a kernel written in Gluon for sm_90 does: `registers` are those it is launched with.

    `serialised` are ptxas's messages about wgmma that it made wait for each other, `threads` the
    size of a program, `copies` the instructions that move tiles, by name.
    """

    threads: int = 0
    serialised: tuple[str, ...] = ()
    copies: dict[str, int] = field(default_factory=dict)

    @property
    def loops(self) -> list[Loop]:
        """Loops around matrix instructions, in every partition."""
        return hot_loops(self.sass, waits_aside=True)

    @property
    def partitions(self) -> list[Partition]:
        """What copies or multiplies between one setmaxnreg and the next."""
        return partitions(self.sass, self.registers)

    def __str__(self) -> str:
        copies = ", ".join(f"{n} {name}" for name, n in self.copies.items())
        return "\n".join(
            (
                f"{self.threads} threads of {self.registers} registers, {self.shared} bytes of "
                f"shared memory, {self.spilled} bytes spilled, {copies}",
                *self.serialised,
                *(f"partition: {p}" for p in self.partitions),
                *(f"loop: {loop}" for loop in self.loops),
            )
        )


def compile_for(
    kernel: Any,
    target: str,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
    num_stages: int | None = None,
) -> MachineCode:
    """Compile for `target`.

    `types` gives each run-time parameter's Triton type ("*bf16", "i32"), `constants` the
    constexprs (None for a tensor that is not given), `divisible` the parameters known to be
    multiples of 16, as Triton specialises them. `num_stages` is the target's own unless given.
    """
    source = _source(ASTSource, kernel, types, constants, divisible)
    gpu = TARGETS[target]
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if num_stages is not None:
        options["num_stages"] = num_stages
    compiled = triton.compile(source, target=gpu, options=options)
    shared = compiled.metadata.shared
    if gpu.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"], shared)
    return _read_nvidia(compiled.asm["cubin"], shared)


def box(dtype: str, shape: Sequence[int], layout: Any) -> str:
    """The type of a descriptor whose copies move boxes of `shape`."""
    return f"tensordesc<{dtype}[{','.join(map(str, shape))}],{layout!r}>"


def compile_gluon(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
    maxnreg: int | None = None,
) -> GluonCode:
    """Compile a kernel written in Gluon for sm_90; the arguments are `compile_for`'s.

    Types of descriptors are made by `box`. `num_warps` are those of the default partition.
    """
    return read_gluon(build_gluon(kernel, types, constants, divisible, num_warps, maxnreg))


def read_gluon(compiled: Any) -> GluonCode:
    """What the machine code of Triton's object for a compiled kernel says."""
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    code = _read_nvidia(cubin, compiled.metadata.shared)
    names = ("UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS")
    return GluonCode(
        **vars(code),
        threads=int(_one(r"\.reqntid (\d+)", ptx)),
        serialised=tuple(re.findall(r"\(C75\d\d\).*", _ptxas_log(ptx, cubin, code.sass))),
        copies={name: len(re.findall(rf"\b{name}\b", code.sass)) for name in names},
    )


def build_gluon(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
    maxnreg: int | None = None,
) -> Any:
    """Triton's own object for what `compile_gluon` reads, with the text of every stage in .asm."""
    source = _source(GluonASTSource, kernel, types, constants, divisible)
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS["sm_90"], options=options)


def _source(
    kind: Any, kernel: Any, types: dict[str, str], constants: dict[str, Any], divisible: set[str]
) -> Any:
    names = list(kernel.arg_names)
    return kind(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )


def _ptxas_log(ptx: str, cubin: bytes, sass: str) -> str:
    """What ptxas said when it made this very code of that text, which Triton does not keep."""
    kept = get_cache_manager(hashlib.sha256(ptx.encode() + cubin).hexdigest())
    known = kept.get_file("ptxas.log")
    if known is not None:
        return Path(known).read_text()
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        # the last since Triton 3.9; it is what ptxas does by itself in 3.6
        flags = ("-lineinfo", "-v", "--gpu-name=sm_90a", "--regAllocOptLevel=2")
        run = subprocess.run(
            [get_ptxas(90).path, *flags, str(text), "-o", str(made)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        # whole files differ now and then, in a few bytes beside the code
        again = _tool("nvdisasm", "-c", str(made))
        assert again == sass, "Triton gives ptxas other flags than these"
    kept.put(run.stderr, "ptxas.log", binary=False)
    return run.stderr


def _read_nvidia(cubin: bytes, shared: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    registers, stack = (int(_one(rf"{what}:(\d+)", usage)) for what in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return MachineCode(
        registers,
        max(stack, 4 * spills),
        shared,
        _widths(r"\bLDG\.E((?:\.\w+)*)", code),
        _widths(r"\bSTG\.E((?:\.\w+)*)", code),
        bool(re.search(_DOUBLE_SASS, code)),
        code,
    )


def _widths(pattern: str, code: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for suffixes in re.findall(pattern, code):
        width = next((int(w) for w in ("128", "64", "256") if f".{w}" in suffixes), 32)
        width = next((w for name, w in (("U16", 16), ("U8", 8)) if name in suffixes), width)
        found[width] = found.get(width, 0) + 1
    return found


def _read_amd(assembly: str, shared: int) -> MachineCode:
    spills = int(_one(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    scratch = int(_one(r"\.private_segment_fixed_size:\s*(\d+)", assembly))

    def widths(what: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for unit in re.findall(rf"\b(?:global|buffer)_{what}_(\w+)", assembly):
            width = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(unit, 16)
            found[width] = found.get(width, 0) + 1
        return found

    return MachineCode(
        int(_one(r"\.vgpr_count:\s*(\d+)", assembly)),
        max(4 * spills, scratch),
        shared,
        widths("load"),
        widths("store"),
        bool(re.search(_DOUBLE_AMDGCN, assembly)),
    )


def _one(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the tool printed"
    return match.group(1)


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
