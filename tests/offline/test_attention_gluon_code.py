"""Machine code of attention's forward for Hopper: every size that ships, and every option once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch

from support.gate import covered, verify
from support.gluon_gate import GluonConfiguration, launched
from support.machine_code import GluonCode
from swathe.kernels.attention import _gluon as launchers
from swathe.kernels.attention._gluon_blocks import boxes, forward_blocks
from swathe.kernels.attention.mask import Mask

SIZES = ((64, 64), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 256))
OPTIONS = ("softcap", "alibi", "sinks", "fp16")
# bytes that the two warps with few registers spill where heads are two pieces, outside of loops
SPILLED = 16


@cache
def build(D: int, E: int, option: str | None) -> GluonCode:
    """What the launcher runs for heads of D and E features."""
    dtype = torch.float16 if option == "fp16" else torch.bfloat16
    q, k, v = (torch.zeros(1, 256, 2, F, dtype=dtype).transpose(1, 2) for F in (D, D, E))
    alibi = torch.zeros(2) if option == "alibi" else None
    places = torch.zeros(1, 256, dtype=torch.int32) if option == "alibi" else None
    sinks = torch.zeros(2) if option == "sinks" else None
    bounds = Mask(causal=True).bounds_int32(256, 256, q.device)
    softcap = 30.0 if option == "softcap" else 0.0
    rest = (*bounds, places, None, None, None, sinks, alibi, None, D**-0.5, softcap, 0.0, False)
    return launched("forward", lambda: launchers.forward(q, k, v, *rest))


def configuration(D: int, E: int, option: str | None = None) -> GluonConfiguration:
    """Three loops in either warpgroup: masked, whole and masked tiles."""
    keys, of_d, of_e = forward_blocks(D, E).keys, boxes(D), boxes(E)
    # k q^T reads both from shared memory, 16 features an instruction; p v holds p in registers
    matrix = {f"64x{keys}x16 SS": sum(of_d) // 16}
    matrix |= {f"64x{width}x16 RS": keys // 16 for width in of_e}
    copies = {"UTMASTG": 2 * len(of_e)}
    label = f"forward {D}/{E}{f' {option}' if option else ''}"
    return GluonConfiguration(
        label,
        partial(build, D, E, option),
        loops=6,
        matrix=(matrix,),
        spilled=SPILLED,
        copies=copies,
    )


def configurations() -> Iterator[GluonConfiguration]:
    for D, E in SIZES:
        yield configuration(D, E)
    for option in OPTIONS:
        yield configuration(128, 128, option)
    yield configuration(256, 256, "softcap")
    yield configuration(80, 80)


CONFIGURATIONS = list(configurations())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: GluonConfiguration) -> None:
    verify("attention_gluon", configuration, "sm_90")


def test_baseline_is_whole() -> None:
    assert covered("attention_gluon", CONFIGURATIONS) == []
