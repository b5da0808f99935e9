"""Machine code of attention's backward for Hopper: every size that ships, and options once each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch

from support.gate import covered, verify
from support.gluon_gate import GluonConfiguration, launched
from support.machine_code import GluonCode
from swathe.kernels.attention import _gluon_backward as launchers
from swathe.kernels.attention._gluon_blocks import boxes
from swathe.kernels.attention.mask import Mask

SIZES = ((64, 64), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 256))
SCORED = ((64, 64), (128, 128), (192, 128), (256, 256))
# bytes that warps which copy spill, outside of loops
SPILLED = 16


@cache
def build(kernel: str, D: int, E: int, option: str | None) -> GluonCode:
    """What the launcher runs for heads of D and E features."""
    dtype = torch.float16 if option == "fp16" else torch.bfloat16
    q, k, v = (torch.zeros(1, 256, 2, F, dtype=dtype).transpose(1, 2) for F in (D, D, E))
    o, lse = torch.zeros(1, 256, 2, E, dtype=dtype), torch.zeros(1, 2, 256)
    scored = option == "scored"
    alibi = torch.zeros(2) if scored else None
    places = torch.zeros(1, 256, dtype=torch.int32) if scored else None
    bounds = Mask(causal=True).bounds_int32(256, 256, q.device)
    softcap = 30.0 if scored else 0.0
    rest = (*bounds, places, None, None, None, None, alibi, None, D**-0.5, softcap, 0.0, False)
    return launched(kernel, lambda: launchers.backward(o, lse, q, k, v, o, lse, *rest))


def for_queries(D: int, E: int, option: str | None = None) -> GluonConfiguration:
    """One loop in either warpgroup: q k^T and do v^T from shared memory, ds k by registers."""
    of_q, _ = launchers.blocks_for(D, E, option == "scored")
    of_d = boxes(D)
    matrix = {f"64x{of_q.keys}x16 SS": (sum(of_d) + sum(boxes(E))) // 16}
    matrix |= {f"64x{width}x16 RS": of_q.keys // 16 for width in of_d}
    return GluonConfiguration(
        _label("dq", D, E, option),
        partial(build, "backward_q", D, E, option),
        loops=2,
        matrix=(matrix,),
        spilled=SPILLED,
        copies={"UTMASTG": 2 * len(of_d)},
    )


def for_keys(D: int, E: int, option: str | None = None) -> GluonConfiguration:
    """One loop in either warpgroup, which are alike unless they share keys."""
    _, of_kv = launchers.blocks_for(D, E, option == "scored")
    of_d, of_e = boxes(D), boxes(E)

    def products(transposed: tuple[int, ...], sums: tuple[int, ...]) -> dict[str, int]:
        found = Counter({f"64x{of_kv.queries}x16 SS": sum(transposed) // 16})
        for width in sums:
            found[f"64x{width}x16 RS"] += of_kv.queries // 16
        return dict(found)

    if of_kv.shared:
        matrix = (products(of_d, of_e), products(of_d + of_e, of_d))
    else:
        matrix = (products(of_d + of_e, of_d + of_e),)
    return GluonConfiguration(
        _label("dk dv", D, E, option),
        partial(build, "backward_kv", D, E, option),
        loops=2,
        matrix=matrix,
        spilled=SPILLED,
        # numbers of rows, two a load
        shared_accesses=of_kv.queries // 2,
        copies={"UTMASTG": (1 if of_kv.shared else 2) * len(of_d + of_e)},
    )


def _label(what: str, D: int, E: int, option: str | None) -> str:
    return f"{what} {D}/{E}{f' {option}' if option else ''}"


def configurations() -> Iterator[GluonConfiguration]:
    for of in (for_queries, for_keys):
        for D, E in SIZES:
            yield of(D, E)
        for D, E in SCORED:
            yield of(D, E, "scored")
        yield of(128, 128, "fp16")
        yield of(80, 80)


CONFIGURATIONS = list(configurations())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: GluonConfiguration) -> None:
    verify("attention_gluon_backward", configuration, "sm_90")


def test_baseline_is_whole() -> None:
    assert covered("attention_gluon_backward", CONFIGURATIONS) == []
