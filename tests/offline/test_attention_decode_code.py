"""Every kind of decoding kernel that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses, no fp64 arithmetic, nothing worse than the committed
baseline; and on Hopper enough tiles under way on a multiprocessor to keep its memory busy.
"""

from __future__ import annotations

import pytest

from support.gate import Configuration, covered, occupancy, verify
from support.machine_code import TARGETS
from swathe.kernels.attention import _triton_decode as decoding

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
OWN = {"first_ptr": "*i32", "last_ptr": "*i32", "places_ptr": "*i32", "table_ptr": "*i32"}
OWN |= dict.fromkeys(("lse_ptr", "parts_ptr", "sums_ptr", "sinks_ptr", "alibi_ptr"), "*fp32")
OWN |= {"keys_ptr": "*u8", "allowed_ptr": "*u8"}
OWN |= dict.fromkeys(("scale", "softcap", "lowest"), "fp32")
OPTIONAL = {"places_ptr", "table_ptr", "sinks_ptr", "alibi_ptr", "keys_ptr", "allowed_ptr"}
OPTIONAL |= {"bias_ptr", "parts_ptr", "sums_ptr"}
FOLDED = frozenset({"parts_ptr", "sums_ptr"})


def configuration(
    D: int,
    rows: int,
    dtype: str,
    *,
    E: int | None = None,
    page: int = 0,
    capability: int | None = None,
    given: frozenset[str] = FOLDED,
    softcap: bool = False,
    label: str = "",
    targets: tuple[str, ...] = tuple(TARGETS),
) -> Configuration:
    """`attend` for `rows` rows that share 8 heads of D features."""
    E = E or D
    dense = bool({"allowed_ptr", "bias_ptr"} & given)
    tile = decoding.tiling(rows, 8, D, E, SIZES[dtype], page > 0, dense, capability)
    if page:
        given |= {"table_ptr"}
    wide_d, wide_e = decoding.width(D), decoding.width(E)
    constants: dict[str, object] = {
        "SCORED": softcap or bool({"alibi_ptr", "bias_ptr"} & given),
        "SOFTCAP": softcap,
        "D_WIDTHS": (wide_d,),
        "E_WIDTHS": (wide_e,),
        "EXACT": (wide_d, wide_e) == (D, E),
        "PRECISION": "ieee",
        "PAGE": page,
        "FEWEST": tile.fewest,
        "MOST": tile.most,
        "BLOCK_M": tile.rows,
        "BLOCK_S": tile.keys,
    }
    constants |= dict.fromkeys(OPTIONAL - given)
    # keys of a dense mask are adjacent
    constants |= {"a_s": 1, "b_s": 1}
    types = {n: "i32" for n in decoding.attend.arg_names if n not in constants}
    types |= {n: OWN.get(n, TYPES[dtype]) for n in types if n.endswith("_ptr")}
    types |= {n: OWN[n] for n in types if n in OWN}
    known = {n for n in types if n not in decoding.PLAIN}
    return Configuration(
        f"{D}-{E}-{dtype}-{tile.rows}" + (f"-page{page}" if page else "") + label,
        decoding.attend,
        types,
        constants,
        frozenset(known),
        tile.warps,
        stages=tile.stages,
        targets=targets,
    )


def folding(E: int, dtype: str) -> Configuration:
    tile = decoding.tiling(16, 8, E, E, SIZES[dtype], False, False, None)
    constants = {"FEWEST": tile.fewest, "MOST": tile.most, "sinks_ptr": None}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_S": tile.keys, "BLOCK_E": decoding.width(E)}
    types = {n: "i32" for n in decoding.fold.arg_names if n not in constants}
    types |= {n: OWN.get(n, TYPES[dtype]) for n in types if n.endswith("_ptr")}
    known = {n for n in types if n.endswith("_ptr") or n == "E"}
    return Configuration(
        f"fold-{E}-{dtype}",
        decoding.fold,
        types,
        constants,
        frozenset(known),
        decoding.fold_warps(E),
        wide=False,  # its sums are read 16 bytes at a time; its one row has 2 for a thread
    )


NVIDIA = ("sm_80", "sm_90", "sm_100")
ALL = frozenset(OPTIONAL - {"table_ptr"})
CONFIGURATIONS = [
    *(configuration(D, 16, "bf16") for D in (64, 80, 128, 256)),
    *(configuration(D, 64, "bf16") for D in (64, 128, 256)),
    # 64 rows of 128 features are for wgmma alone
    configuration(128, 64, "bf16", capability=90, targets=("sm_90",)),
    configuration(128, 64, "bf16", page=16, capability=90, targets=("sm_90",)),
    configuration(128, 16, "fp16"),
    configuration(192, 16, "bf16", E=128),
    configuration(80, 64, "bf16"),
    configuration(80, 16, "bf16", page=16),
    *(configuration(128, 16, "bf16", page=page) for page in (16, 64)),
    configuration(128, 64, "bf16", page=16),
    configuration(128, 16, "bf16", given=frozenset(), label="-alone", targets=NVIDIA),
    configuration(128, 16, "bf16", given=FOLDED | {"sinks_ptr"}, label="-sinks"),
    configuration(128, 16, "bf16", softcap=True, label="-softcap"),
    configuration(128, 16, "bf16", given=FOLDED | {"alibi_ptr", "places_ptr"}, label="-alibi"),
    configuration(128, 16, "bf16", given=FOLDED | {"keys_ptr"}, label="-keys"),
    # AMD is given a bias in its place
    configuration(
        128, 16, "bf16", given=FOLDED | {"allowed_ptr"}, label="-allowed", targets=NVIDIA
    ),
    configuration(128, 16, "bf16", given=FOLDED | {"bias_ptr"}, label="-bias"),
    configuration(256, 16, "bf16", given=FOLDED | {"bias_ptr"}, label="-bias"),
    configuration(128, 16, "bf16", given=ALL, softcap=True, label="-everything", targets=NVIDIA),
    *(configuration(D, 16, "fp32") for D in (128, 256)),
    folding(128, "bf16"),
    folding(256, "bf16"),
]
SHIPPED = [(c, t) for c in CONFIGURATIONS for t in c.targets]


@pytest.mark.parametrize(("configuration", "target"), SHIPPED, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("attention_decode", configuration, target)


@pytest.mark.parametrize("page", [0, 16, 64])
def test_programs_share_a_multiprocessor_of_hopper(page: int) -> None:
    shape = configuration(128, 16, "bf16", page=page)
    code = shape.compile("sm_90")
    programs = min(occupancy(code, "sm_90", 4) // 4, 227 * 1024 // (code.shared + 1024))
    # keys and values of two tiles of 64 in each; 26 KiB a multiprocessor hide 0.8 us at 4.3 TB/s
    assert programs >= 2 and code.shared >= 2 * 2 * 64 * 128 * 2


def test_baseline_is_whole() -> None:
    assert covered("attention_decode", CONFIGURATIONS) == []
