"""Every LayerNorm configuration that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses wherever the row length allows them, no fp64 arithmetic, no
more bytes than the tile has, and nothing worse than the committed baseline.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.core.row_blocks import ROW_LIMIT_FORWARD, whole_rows_backward
from swathe.kernels.core.tune import Blocks
from swathe.kernels.layer_norm import _triton as kernels

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# one row length for each block size that a launcher can choose
ROWS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384]
WIDE = [65_536]
FP32 = {"statistics_ptr", "partial_ptr", "dots_ptr"}


def configuration(
    name: str,
    N: int,
    dtype: str,
    *,
    add: bool = False,
    weight: bool = True,
    bias: bool = True,
    odd: bool = False,
) -> Configuration:
    """One specialisation: which kernel, for which row length, type and options."""
    kernel: Any = getattr(kernels, f"_{name}")
    forward = name.startswith("forward")
    blocks = kernels.forward_blocks(N) if forward else kernels.backward_blocks(N)
    offered = {
        "ADD": add,
        "WEIGHT": weight,
        "BIAS": bias,
        "SUMS": weight or bias,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns,
    }
    types = {n: "i32" for n in kernel.arg_names if n not in offered}
    types |= {n: "*fp32" if n in FP32 else TYPES[dtype] for n in types if n.endswith("_ptr")}
    types |= {"eps": "fp32"} if "eps" in types else {}
    known = {n for n in types if n.endswith("_ptr")}
    if not odd:
        known |= {n for n in types if n != "M" and types[n] == "i32"}
    flags = "-add" * add + "-odd" * odd + "-no_weight" * (not weight) + "-no_bias" * (not bias)
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


def _least(name: str, blocks: Blocks, size: int, add: bool) -> tuple[int | None, int | None]:
    """Bytes of a tile's inputs and outputs; weights and row scalars come on top of the reads."""
    rows, columns, warps = blocks
    tile = rows * columns * size
    # every thread that holds a column reads its weight and bias, every one of a row its scalars
    extra = 2 * tile + 32 * 2 * warps * 4 * 2 * max(4, rows)
    if name == "forward_rows":
        return tile * (1 + add) + extra, tile * (1 + add) + extra
    if name == "forward_wide":
        return tile * (2 + add) + extra, tile * (1 + add) + extra
    if name == "backward_dots":
        return 2 * tile + extra, extra
    return tile * (2 + add) + extra, tile + 2 * columns * 4 + extra


def shipped() -> list[Configuration]:
    """What the launchers choose from, over every block size, type and option."""
    found = []
    for N in ROWS + WIDE:
        forward = "forward_rows" if N <= ROW_LIMIT_FORWARD else "forward_wide"
        backward = "backward_rows" if whole_rows_backward(N) else "backward_columns"
        for dtype in ("bf16", "fp32"):
            for add in (False, True):
                found.append(configuration(forward, N, dtype, add=add))
                # past the limit all row lengths share one tile
                if whole_rows_backward(N) or N in WIDE:
                    found.append(configuration(backward, N, dtype, add=add))
    for name, N in (
        ("forward_rows", 4096),
        ("forward_wide", 65_536),
        ("backward_rows", 4096),
        ("backward_dots", 65_536),
        ("backward_columns", 65_536),
    ):
        found.append(configuration(name, N, "bf16", weight=False, bias=False))
        if name.startswith("forward"):
            found.append(configuration(name, N, "bf16", bias=False))
    found += [configuration("backward_dots", 65_536, d) for d in ("bf16", "fp32")]
    # fp16 takes the same instructions as bf16: one of each kind shows that it compiles
    found += [configuration(n, 4096, "fp16", add=True) for n in ("forward_rows", "backward_rows")]
    for N in (1, 37, 4095, 8191, 33_001):
        forward = "forward_rows" if N <= ROW_LIMIT_FORWARD else "forward_wide"
        backward = "backward_rows" if whole_rows_backward(N) else "backward_columns"
        found += [configuration(n, N, "bf16", add=True, odd=True) for n in (forward, backward)]
    return found


CONFIGURATIONS = shipped()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("layer_norm", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("layer_norm", CONFIGURATIONS) == []
