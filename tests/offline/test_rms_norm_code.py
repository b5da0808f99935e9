"""Every RMSNorm configuration that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses wherever the row length allows them, no fp64 arithmetic, no
more bytes than the tile has, and nothing worse than the committed baseline.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.core import partials
from swathe.kernels.core.row_blocks import ROW_LIMIT_FORWARD, whole_rows_backward
from swathe.kernels.norm import _triton as norm

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# one row length for each block size that a launcher can choose
ROWS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384]
WIDE = [65_536]
FP32 = {"rstd_ptr", "partial_ptr", "dot_ptr"}


def configuration(
    name: str, N: int, dtype: str, *, add: bool = False, llama: bool = False, odd: bool = False
) -> Configuration:
    """One specialisation: which kernel, for which row length, type and options."""
    kernel: Any = getattr(norm, f"_{name}")
    blocks = norm.forward_blocks(N) if name.startswith("forward") else norm.backward_blocks(N)
    offered = {
        "ADD": add,
        "LLAMA": llama,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns,
    }
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in FP32 else TYPES[dtype]
        elif argument not in offered:
            types[argument] = "fp32" if argument in ("eps", "offset") else "i32"
    known = {n for n in types if n.endswith("_ptr") or (n != "M" and types[n] == "i32")}
    known = {n for n in known if n.endswith("_ptr")} if odd else known
    flags = "-add" * add + "-llama" * llama + "-odd" * odd
    reads, writes = (None, None) if odd else _least(name, blocks, SIZES[dtype], add)
    return Configuration(
        f"{name}-{N}-{dtype}{flags}",
        kernel,
        types,
        {k: v for k, v in offered.items() if k in kernel.arg_names},
        frozenset(known),
        blocks.warps,
        reads,
        writes,
        wide=not odd and name != "backward_dots",
    )


def _least(name: str, blocks: Any, size: int, add: bool) -> tuple[int | None, int | None]:
    """Bytes of a tile's inputs and outputs; the weight and row scalars come on top of the reads."""
    rows, columns, warps = blocks
    tile = rows * columns * size
    # every thread that holds a column reads its weight, every one that holds a row its rstd
    extra = rows * columns * size + 32 * 2 * warps * 4 * max(4, rows)
    if name == "forward_rows":
        return tile * (1 + add) + extra, tile * (1 + add) + extra
    if name == "forward_wide":
        return tile * (2 + add) + extra, tile * (1 + add) + extra
    if name == "backward_dots":
        return 2 * tile + extra, extra
    return tile * (2 + add) + extra, tile + columns * 4 + extra


def shipped() -> list[Configuration]:
    """What the launchers choose from, over every block size, type and option."""
    found = []
    for N in ROWS + WIDE:
        for dtype in ("bf16", "fp32"):
            for add in (False, True):
                kernel = "forward_rows" if N <= ROW_LIMIT_FORWARD else "forward_wide"
                found += [
                    configuration(kernel, N, dtype, add=add, llama=llama) for llama in (False, True)
                ]
                kernel = "backward_rows" if whole_rows_backward(N) else "backward_columns"
                # past the limit all row lengths share one tile
                if whole_rows_backward(N) or N in WIDE:
                    found.append(configuration(kernel, N, dtype, add=add))
    found += [configuration("backward_dots", 65_536, d) for d in ("bf16", "fp32")]
    # fp16 takes the same instructions as bf16: one of each kernel shows that it compiles
    found += [configuration("forward_rows", 4096, "fp16", add=True, llama=True)]
    found += [configuration("backward_rows", 4096, "fp16", add=True)]
    for N in (1, 37, 4095, 8191, 33_001):
        forward = "forward_rows" if N <= ROW_LIMIT_FORWARD else "forward_wide"
        backward = "backward_rows" if whole_rows_backward(N) else "backward_columns"
        found += [
            configuration(name, N, "bf16", add=True, odd=True) for name in (forward, backward)
        ]
    return [*found, *sums()]


def sums() -> list[Configuration]:
    """The sum of partial rows that every weight gradient ends with."""
    return [
        Configuration(
            f"sum_partials-{block[0]}-{dtype}",
            partials._sum_partials,
            {"partial_ptr": "*fp32", "out_ptr": TYPES[dtype], "N": "i32", "P": "i32"},
            dict(zip(("BLOCK_P", "BLOCK_N"), block, strict=True)),
            frozenset({"partial_ptr", "out_ptr", "N"}),
            partials.WARPS,
            wide=False,
        )
        for block in (partials.TALL, partials.FLAT)
        for dtype in ("bf16", "fp32")
    ]


CONFIGURATIONS = shipped()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("rms_norm", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("rms_norm", CONFIGURATIONS) == []
