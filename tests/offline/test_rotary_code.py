"""Every rotary configuration that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses wherever the heads allow them, no fp64 arithmetic, no more
bytes than the tile and its angles have, and nothing worse than the committed baseline.
"""

from __future__ import annotations

import pytest

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.core import rotation
from swathe.kernels.core.heads import blocks, unit
from swathe.kernels.rotary import _triton as turn

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TABLES = ("cos_ptr", "sin_ptr")
# head sizes of every block that a launcher can choose, with and without features past the pairs
HEADS = ((16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 64), (80, 32))


def configuration(
    D: int,
    R: int,
    dtype: str,
    *,
    table: str | None = None,
    form: int = rotation.HALVES,
    positions: bool = False,
    mrope: bool = False,
    interleaved: bool = False,
    rounded: bool = False,
    back: bool = False,
) -> Configuration:
    """One specialisation: head size, types, and how pairs and their entries lie."""
    tile = blocks(D, R)
    step = unit(R // 2)
    constants = {
        "FORM": form,
        "POSITIONS": positions,
        "MROPE": mrope,
        "UNIT": step,
        "INTERLEAVED": interleaved,
        "ROUND": rounded,
        "BACK": back,
        "BLOCK_M": tile.tokens,
        "BLOCK_I": tile.pairs,
        "BLOCK_T": tile.rest,
    }
    types = {n: "i32" for n in turn._rotate.arg_names if n not in constants}
    types |= {n: TYPES[dtype] for n in types if n.endswith("_ptr")}
    types |= dict.fromkeys(TABLES, TYPES[table or dtype]) | {"positions_ptr": "*i64"}
    free = {"M", "S", "H", "Hk", "heads_each", "rows", "h_start", "w_start"}
    known = {n for n in types if n.endswith("_ptr")}
    known |= {n for n in types if n not in free and types[n] == "i32"}
    known -= {"step"} | ({"D"} if D % 16 else set())
    flags = {"back": back, "rounded": rounded, "interleaved": interleaved, "mrope": mrope}
    flags |= {"positions": positions, "compact": form == rotation.COMPACT}
    name = f"{D}-{R}-{dtype}-{table or dtype}" + "".join(f"-{k}" for k, v in flags.items() if v)
    rows, lanes = tile.tokens, 2 * tile.pairs + tile.rest
    heads = rows * lanes * SIZES[dtype]
    angles = rows * 4 * tile.pairs * SIZES[table or dtype]
    extra = 64 * tile.warps * 8 * (1 + rows // 8)
    # a loop as short as that of 80-32 is unrolled, eight times at most, for sm_80 and sm_90
    copies = 8 if (D, R) == (80, 32) else 1
    return Configuration(
        name,
        turn._rotate,
        types,
        constants,
        frozenset(known),
        tile.warps,
        # two heads ahead of the loop and one in it, unless the copies are asynchronous
        reads=copies * (4 * heads + (64 * angles if mrope and positions else angles) + extra),
        writes=copies * (heads + extra),
        # entries of neighbours and of sections are gathered; a tail of 48 leaves a thread 8 bytes
        wide=form != rotation.PAIRS and not mrope and (D, R) != (80, 32),
        # one wave of 64 lanes is the least that works on 32 tokens of 8 pairs
        narrow=("gfx942",) if lanes * SIZES[dtype] <= 32 else (),
        wave_warps=max(1, tile.warps // 2),
    )


def shipped() -> list[Configuration]:
    """Every head size forward and back, then every form of tables and pairs on two of them."""
    found = []
    for D, R in HEADS:
        for dtype in ("bf16", "fp32"):
            found += [configuration(D, R, dtype, back=back) for back in (False, True)]
        found.append(configuration(D, R, "bf16", rounded=True))
    for D, R in ((128, 128), (128, 64)):
        both = {"interleaved": True, "form": rotation.PAIRS}
        found += [
            configuration(D, R, "bf16", table="fp32"),
            configuration(D, R, "bf16", form=rotation.COMPACT),
            configuration(D, R, "bf16", **both),
            configuration(D, R, "bf16", interleaved=True, form=rotation.COMPACT),
            configuration(D, R, "bf16", positions=True),
            configuration(D, R, "bf16", mrope=True),
            configuration(D, R, "bf16", mrope=True, positions=True),
        ]
    return [*found, configuration(128, 128, "fp16"), configuration(4096, 4096, "bf16")]


CONFIGURATIONS = shipped()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("rotary", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("rotary", CONFIGURATIONS) == []
