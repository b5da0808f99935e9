"""Every attention configuration that ships, compiled for GPUs that are not here.

What a target lacks: TMA and wgmma before sm_90; on gfx942 copies that run ahead of their use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.gate import TRITON, Configuration, covered, verify
from swathe.kernels.attention import _triton_backward, _triton_forward
from swathe.kernels.attention._triton_blocks import Blocks, cut_for

KERNELS = {
    "forward": _triton_forward.forward,
    "backward_q": _triton_backward.backward_q,
    "backward_kv": _triton_backward.backward_kv,
    "backward_bias": _triton_backward.backward_bias,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONAL = {
    "dlse_ptr": "*fp32",
    "places_ptr": "*i32",
    "sinks_ptr": "*fp32",
    "alibi_ptr": "*fp32",
    "keys_ptr": "*u8",
    "allowed_ptr": "*u8",
    "bias_ptr": "*bf16",
    "seed_ptr": "*i64",
}
FIXED = {"lse_ptr": "*fp32", "stats_ptr": "*fp32", "dbias_ptr": "*bf16"}
FIXED |= dict.fromkeys(("first_ptr", "last_ptr", "seen_ptr", "reach_ptr"), "*i32")
FIXED |= dict.fromkeys(("scale", "softcap", "lowest", "probability"), "fp32")
# strides that are multiples of 16 in every layout that a projection leaves
STRIDES = ("q", "k", "v", "o", "do", "dq", "dk", "dv")


def configuration(
    name: str,
    D: int,
    E: int | None = None,
    dtype: str = "bf16",
    *,
    generation: str = "hopper",
    tma: bool = False,
    given: tuple[str, ...] = (),
    softcap: bool = False,
) -> Configuration:
    """One specialisation: `given` are the optional tensors that the call has."""
    E, kernel = E or D, KERNELS[name]
    dense = not {"allowed_ptr", "bias_ptr", "seed_ptr"}.isdisjoint(given)
    made = cut_for(D, E, DTYPES[dtype], generation, dense)
    block: Blocks = getattr(made, "backward_q" if name == "backward_bias" else name)
    constants: dict[str, Any] = {
        "SCORED": softcap or "alibi_ptr" in given or "bias_ptr" in given,
        "SOFTCAP": softcap,
        "D_WIDTHS": made.of_d,
        "E_WIDTHS": made.of_e,
        "EXACT": made.exact,
        "TMA": tma,
        "PRECISION": "ieee",
        "BLOCK_T": block.queries,
        "BLOCK_S": block.keys,
        "RATIO": made.backward_q.queries // block.queries,
    }
    constants |= {n: None for n in OPTIONAL if n not in given}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    types = {n: "i32" for n in kernel.arg_names if n not in constants}
    types |= {n: f"*{dtype}" for n in types if n.endswith("_ptr")}
    types |= {n: t for n, t in (FIXED | OPTIONAL).items() if n in types}
    if tma:
        streams = {"q_ptr": D, "do_ptr": E} if name == "backward_kv" else {"k_ptr": D, "v_ptr": E}
        rows = block.queries if name == "backward_kv" else block.keys
        types |= {n: f"tensordesc<{dtype}[1,1,{rows},{w}]>" for n, w in streams.items()}
    known = {n for n in types if types[n].startswith("*") and n != "keys_ptr"}
    if D % 16 == 0 and E % 16 == 0:
        known |= {n for n in types if n.rsplit("_", 1)[0] in STRIDES and types[n] == "i32"}
        known |= {"D", "E"}
    marks = "".join(f"-{n.removesuffix('_ptr')}" for n in given) + "-softcap" * softcap
    path = f"-{generation}" + "-tma" * tma
    return Configuration(
        f"{name}-{D}-{E}-{dtype}{path}{marks}",
        kernel,
        types,
        constants,
        frozenset(known),
        block.warps,
        wide=False,
        stages=block.stages,
        targets=TARGETS_OF[generation],
    )


LOST = {("3.9", "forward", 64)}  # with 3.6, which has 97 % of them in flight, it does not
TARGETS_OF = {
    "hopper": ("sm_90",),
    "blackwell": ("sm_100",),
    "mma": ("sm_80",),
    "mfma": ("gfx942",),
}
THREE = ("forward", "backward_q", "backward_kv")


def on_hopper() -> Iterator[Configuration]:
    """What sm_90 runs: every size, and every optional tensor once."""
    for name in THREE:
        for D, E in ((64, 64), (128, 128), (256, 256)):
            yield configuration(name, D, E, tma=True)
        for D, E in ((80, 80), (192, 128)):
            yield configuration(name, D, E)
    yield configuration("forward", 64, dtype="fp32")
    yield configuration("backward_kv", 64, dtype="fp32")
    yield configuration("forward", 128, tma=True, given=("sinks_ptr",))
    yield configuration("forward", 128, tma=True, given=("alibi_ptr",))
    yield configuration("forward", 256, tma=True, softcap=True)
    yield configuration("forward", 128)
    for given in (("keys_ptr",), ("bias_ptr",), ("allowed_ptr",)):
        for name in THREE:
            yield configuration(name, 64, given=given)
            yield configuration(name, 128, given=given)
    yield configuration("forward", 64, given=("seed_ptr",))
    yield configuration("backward_kv", 64, given=("seed_ptr",))
    yield configuration("backward_q", 128, tma=True, given=("dlse_ptr",))
    yield configuration("backward_bias", 64, given=("bias_ptr",))


def on_blackwell() -> Iterator[Configuration]:
    """What sm_100 runs."""
    for name in THREE:
        for D, E in ((64, 64), (128, 128)):
            yield configuration(name, D, E, tma=True, generation="blackwell")
        yield configuration(name, 192, 128, generation="blackwell")


def elsewhere() -> Iterator[Configuration]:
    """What sm_80 and gfx942 run."""
    for generation in ("mma", "mfma"):
        for name in THREE:
            for D, E in ((64, 64), (128, 128), (256, 256), (80, 80), (192, 128)):
                yield configuration(name, D, E, generation=generation)
            yield configuration(name, 64, generation=generation, given=("keys_ptr",))
            yield configuration(name, 128, generation=generation, given=("bias_ptr",))
        yield configuration("forward", 64, generation=generation, softcap=True)


CONFIGURATIONS = [*on_hopper(), *on_blackwell(), *elsewhere()]
PAIRS = [(c, target) for c in CONFIGURATIONS for target in c.targets]


@pytest.mark.parametrize(("configuration", "target"), PAIRS, ids=str)
def test_shipped_code(configuration: Configuration, target: str) -> None:
    verify("attention", configuration, target)


def test_baseline_is_whole() -> None:
    assert covered("attention", CONFIGURATIONS) == []


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", THREE)
def test_hopper_works_while_exponentials_are_taken(name: str, D: int) -> None:
    """Tiles that need no mask: wgmma fed by the TMA, and the softmax beside it."""
    if (TRITON, name, D) in LOST:
        pytest.skip("this Triton's ptxas waits for the product before the softmax")
    code = configuration(name, D, tma=True).compile("sm_90")
    loop = code.loops[0]
    assert "HGMMA" in code.sass and loop.copies_by_tma == 2 and loop.spills == 0, str(loop)
    assert loop.in_flight >= 90, str(loop)
