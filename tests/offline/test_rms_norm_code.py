"""Every RMSNorm configuration that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses wherever the row length allows them, no fp64 arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from support.machine_code import TARGETS, MachineCode, compile_for
from swathe.kernels.norm import _triton as norm

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# one row length for each block size that a launcher can choose
ROWS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384]
WIDE = [65_536]


class Shipped(NamedTuple):
    """One specialisation: which kernel, for which row length, type and options."""

    kernel: str
    N: int
    dtype: str
    add: bool
    llama: bool = False

    def __str__(self) -> str:
        flags = ("-add" if self.add else "") + ("-llama" if self.llama else "")
        return f"{self.kernel}-{self.N}-{self.dtype}{flags}"


def shipped() -> list[Shipped]:
    """What the launchers choose from, over every block size, type and option."""
    found = []
    for N in ROWS + WIDE:
        for dtype in ("bf16", "fp32"):
            for add in (False, True):
                kernel = "forward_rows" if N <= norm.ROW_LIMIT_FORWARD else "forward_wide"
                found += [Shipped(kernel, N, dtype, add, llama) for llama in (False, True)]
                kernel = "backward_rows" if norm.whole_rows_backward(N) else "backward_columns"
                # past the limit all row lengths share one tile
                if N <= norm.ROW_LIMIT_BACKWARD or N in WIDE:
                    found.append(Shipped(kernel, N, dtype, add))
    found += [Shipped("backward_dots", 65_536, d, False) for d in ("bf16", "fp32")]
    found += [Shipped("sum_partials", 4096, d, False) for d in ("bf16", "fp32")]
    # fp16 takes the same instructions as bf16: one of each kernel shows that it compiles
    found += [Shipped("forward_rows", 4096, "fp16", True, True)]
    found += [Shipped("backward_rows", 4096, "fp16", True)]
    return found


def build(case: Shipped, target: str, N_divisible: bool = True) -> MachineCode:
    kernel = getattr(norm, f"_{case.kernel}")
    forward = case.kernel.startswith("forward")
    blocks = norm.forward_blocks(case.N) if forward else norm.backward_blocks(case.N)
    offered: dict[str, Any] = {
        "ADD": case.add,
        "LLAMA": case.llama,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns,
        "BLOCK_P": 32,
    }
    warps = blocks.warps
    if case.kernel == "sum_partials":
        offered["BLOCK_N"], warps = 64, 4
    fp32 = {"rstd_ptr", "partial_ptr", "dot_ptr"}
    types = {}
    for name in kernel.arg_names:
        if name in offered:
            continue
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name in fp32 else TYPES[case.dtype]
        else:
            types[name] = "fp32" if name in ("eps", "offset") else "i32"
    divisible = {n for n in types if n.endswith(("_ptr", "_stride")) or n == "N"}
    if not N_divisible:
        divisible = {n for n in divisible if n.endswith("_ptr")}
    constants = {n: v for n, v in offered.items() if n in kernel.arg_names}
    return compile_for(kernel, target, types, constants, divisible, warps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", shipped(), ids=str)
def test_shipped_code(case: Shipped, target: str) -> None:
    code = build(case, target)
    assert code.spilled == 0, f"{code.spilled} bytes spilled at {code.registers} registers"
    assert not code.double_arithmetic
    assert code.loads.get(128, 0) >= 1, code.loads
    if case.kernel not in ("sum_partials", "backward_dots"):
        assert code.stores.get(128, 0) >= 1, code.stores
        # per-row scalars are the only narrow accesses
        wide, narrow = code.loads[128], sum(n for w, n in code.loads.items() if w < 128)
        assert narrow <= max(8, wide), code.loads


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("N", [1, 37, 4095, 8191, 33_001])
def test_odd_rows_compile_without_spills(N: int, target: str) -> None:
    forward = "forward_rows" if N <= norm.ROW_LIMIT_FORWARD else "forward_wide"
    backward = "backward_rows" if norm.whole_rows_backward(N) else "backward_columns"
    for kernel in (forward, backward):
        code = build(Shipped(kernel, N, "bf16", True), target, N_divisible=False)
        assert code.spilled == 0, f"{kernel}: {code.spilled} bytes at {code.registers} registers"
