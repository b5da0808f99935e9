"""Every qk_norm_rotary configuration that ships, compiled for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import triton
from triton.compiler import ASTSource

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.core.heads import blocks, unit
from swathe.kernels.core.rotation import HALVES, PAIRS
from swathe.kernels.qk_norm_rotary import _triton as kernels

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TABLES = ("cos_ptr", "sin_ptr")
# heads as models have them: tiles of several heights, a half of 40 pairs, and tails
HEADS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (1024, 1024)]
TAILS = [(80, 32), (128, 64), (256, 64)]


def configuration(
    kernel: Any,
    D: int,
    R: int,
    dtype: str = "bf16",
    *,
    table: str | None = None,
    form: int = HALVES,
    interleaved: bool = False,
    rounds: tuple[bool, bool, bool] = (False, False, False),
    positions: bool = False,
    mrope: bool = False,
) -> Configuration:
    """One specialisation; D that is no multiple of 16 stands for unaligned rows."""
    half, tile = R // 2, blocks(D, R)
    constants = {
        "FORM": form,
        "POSITIONS": positions,
        "MROPE": mrope,
        "UNIT": unit(half),
        "INTERLEAVED": interleaved,
        **dict(zip(("ROUND_XHAT", "ROUND_H", "ROUND_Y"), rounds, strict=True)),
        "BLOCK_M": tile.tokens,
        "BLOCK_I": tile.pairs,
        "BLOCK_T": tile.rest,
    }
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {n: "i32" for n in kernel.arg_names if n not in constants}
    types |= {n: TYPES[dtype] for n in types if n.endswith("_ptr")}
    own = {"positions_ptr": "*i64" if positions else TYPES[table or dtype]}
    own |= {"partial_ptr": "*fp32", "eps": "fp32", "offset": "fp32"}
    own |= dict.fromkeys(TABLES, TYPES[table or dtype])
    types |= {n: t for n, t in own.items() if n in types}
    aligned = D % 16 == 0
    known = {n for n in types if n.endswith("_ptr")}
    if aligned:
        known |= {n for n in types if n[-2:] in ("_b", "_h", "_s") or n.endswith("_stride")}
        known |= {"D"} | ({"step"} if half // unit(half) % 16 == 0 else set())
    marks = f"-tables_{table}" if table else ""
    marks += "-interleaved" * interleaved + "-compact" * (form == 1) + "-positions" * positions
    marks += "-mrope" * mrope + "-rounds" * sum(rounds)
    backward = kernel is kernels._backward
    reads, writes = _least(D, R, dtype, table or dtype, backward)
    if positions:
        # a row of the table for each token, with sections for each pair
        reads += 8 * (tile.tokens * tile.pairs if mrope else 64 * tile.warps)
    # entries of sections and of pairs are gathered; a tail of 192 leaves a thread one pair
    wide = aligned and not mrope and form != PAIRS and (D, R) != (256, 64)
    return Configuration(
        f"{'backward' if backward else 'forward'}-{D}-{R}-{dtype}{marks}",
        kernel,
        types,
        constants,
        frozenset(known),
        tile.warps,
        reads if aligned and form != PAIRS else None,
        writes if aligned else None,
        wide=wide,
        wave_warps=max(1, tile.warps // 2),
    )


def _least(D: int, R: int, dtype: str, table: str, backward: bool) -> tuple[int, int]:
    """Bytes of a tile: x, the tables and, in every thread that holds a column, its weight."""
    tile = blocks(D, R)
    pairs, rest = tile.tokens * 2 * tile.pairs, tile.tokens * tile.rest
    threads = 32 * tile.warps
    # a tail narrower than the threads is read by several of them
    x = (pairs + rest) * SIZES[dtype] + (16 * threads if rest else 0)
    tables = 2 * pairs * SIZES[table]
    # two tiles ahead of the loop and one in it, unless the copies are asynchronous
    reads = (6 if backward else 3) * x + x + 4 * threads + tables
    sums = 2 * (2 * tile.pairs + tile.rest) * 4 + 16 * threads if backward else 0
    return reads, 3 * x + sums


def shipped() -> Iterator[Configuration]:
    """What the launchers choose from: every tile, then every flag on one tile."""
    for kernel in (kernels._forward, kernels._backward):
        for D, R in HEADS + TAILS:
            yield configuration(kernel, D, R)
            if (D, R) in ((128, 128), (128, 64)):
                yield configuration(kernel, D, R, "fp32")
        yield configuration(kernel, 128, 128, table="fp32")
        yield configuration(kernel, 128, 128, "fp16")
        yield configuration(kernel, 128, 128, form=1)
        yield configuration(kernel, 128, 128, positions=True)
        yield configuration(kernel, 128, 128, positions=True, mrope=True)
        yield configuration(kernel, 128, 64, form=PAIRS, interleaved=True)
        yield configuration(kernel, 128, 64, form=1, interleaved=True)
        yield configuration(kernel, 37, 36)
        yield configuration(kernel, 7, 6, "fp32", form=PAIRS, interleaved=True)
    for rounds in ((True, True, True), (False, True, True), (True, True, False)):
        table = None if rounds[2] else "fp32"
        yield configuration(kernels._forward, 128, 128, rounds=rounds, table=table)


CONFIGURATIONS = list(shipped())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("qk_norm_rotary", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("qk_norm_rotary", CONFIGURATIONS) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_rows_arrive_ahead_in_copies_of_16_bytes(kernel: str, target: str) -> None:
    shipped = configuration(getattr(kernels, kernel), 80, 80)
    names = list(shipped.kernel.arg_names)
    source = ASTSource(
        fn=shipped.kernel,
        signature={n: shipped.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in shipped.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in shipped.divisible},
    )
    options = {"num_warps": shipped.warps, "enable_fp_fusion": True}
    code = triton.compile(source, target=TARGETS[target], options=options)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+)", code.asm["ptx"])
    tiles = 2 if kernel == "_forward" else 4
    # two ahead of the loop and one in it
    assert len(copies) == 3 * tiles and {int(size, 0) for size in copies} == {16}
