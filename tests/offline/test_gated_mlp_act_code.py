"""Every gated_mlp_act configuration that ships, compiled for GPUs that are not here.

No register spills, 16-byte accesses wherever the row length allows them, no fp64 arithmetic, no
more bytes than the tile has, and nothing worse than the committed baseline.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.gate import Configuration, covered, verify
from support.machine_code import TARGETS
from swathe.kernels.gated_mlp_act import _triton as gated
from swathe.kernels.gated_mlp_act.api import ACTS

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# blocks read and written by a tile; an interleaved tensor counts as two
MOVES = {
    "forward": (2, 1),
    "forward_interleaved": (2, 1),
    "backward": (3, 2),
    "backward_interleaved": (3, 2),
}


def configuration(
    name: str,
    dtype: str,
    act: str,
    *,
    columns: int = gated.TILE,
    llama: bool = False,
    odd: bool = False,
) -> Configuration:
    """One specialisation: which kernel, for which type, activation and width of tile."""
    kernel: Any = getattr(gated, f"_{name}")
    constants = {"ACT": act, "BLOCK_M": gated.TILE // columns, "BLOCK_N": columns}
    if name.startswith("forward"):
        constants["LLAMA"] = llama
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types[argument] = TYPES[dtype]
        elif argument not in constants:
            types[argument] = "fp32" if argument in ("limit", "alpha") else "i32"
    known = {n for n in types if n.endswith("_ptr") or (types[n] == "i32" and n not in ("M", "N"))}
    known = {n for n in known if n.endswith("_ptr")} if odd else known | {"N"}
    reads, writes = (n * gated.TILE * SIZES[dtype] for n in MOVES[name])
    return Configuration(
        f"{name}-{act}-{columns}-{dtype}{'-llama' * llama}{'-odd' * odd}",
        kernel,
        types,
        constants,
        frozenset(known),
        gated.WARPS_BACKWARD_INTERLEAVED if name == "backward_interleaved" else gated.WARPS,
        None if odd else reads,
        None if odd else writes,
        wide=not odd,
    )


def shipped() -> list[Configuration]:
    """What the launchers choose from: every activation, type, rounding and width of tile."""
    found = []
    for act in ACTS:
        # the interleaved backward holds most; relu has less arithmetic than any other
        for name in ("forward", "backward", "backward_interleaved"):
            found.append(configuration(name, "bf16", act))
        if not act.startswith("relu"):
            found.append(configuration("forward", "bf16", act, llama=True))
            found += [configuration(name, "fp32", act) for name in ("forward", "backward")]
    found.append(configuration("forward_interleaved", "bf16", "gpt_oss"))
    for name in MOVES:
        # gpt_oss has most arithmetic, so it shows what a width or a layout costs
        found += [configuration(name, "bf16", "gpt_oss", columns=n) for n in gated.WIDTHS[1:]]
        found.append(configuration(name, "bf16", "gpt_oss", odd=True))
        # fp16 takes the same instructions as bf16: one of each kernel shows that it compiles
        found.append(configuration(name, "fp16", "gelu_tanh", llama=name.startswith("forward")))
    for name in ("forward_interleaved", "backward_interleaved"):
        found.append(configuration(name, "fp32", "gpt_oss"))
    return found


CONFIGURATIONS = shipped()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("gated_mlp_act", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("gated_mlp_act", CONFIGURATIONS) == []
