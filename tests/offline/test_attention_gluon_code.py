"""Every configuration of attention's Hopper kernels that ships, as its launcher launches it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from support.gate import TRITON, covered, verify
from support.gluon_gate import GluonConfiguration, launched, wgmma
from swathe.kernels.attention import _gluon, _gluon_backward
from swathe.kernels.attention._gluon_backward import blocks_for
from swathe.kernels.attention._gluon_blocks import FORWARD, boxes, forward_blocks
from swathe.kernels.attention.op import empty_forward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
T, S, H, K = 256, 512, 4, 2
# bytes that a kernel may spill before and after its loops
FEW = 80
# known, by Triton's version: bytes, and instructions in a loop
SPILLED: dict[str, dict[str, tuple[int, int]]] = {
    # its ptxas gives backward_q's accumulators fewer registers than that of 3.6, which counts
    "3.9": {
        "backward_q-128-128-bf16": (88, 9),
        "backward_q-128-128-bf16-dlse": (88, 9),
        "backward_q-128-128-fp16": (88, 9),
        "backward_q-256-256-bf16": (140, 15),
    },
}
# percent of the exponentials beside a product, where a version of ptxas moves some away
IN_FLIGHT = {"3.9": {"backward_kv-160-160-bf16": 78}}


def heads(rows: int, count: int, D: int, dtype: torch.dtype) -> Tensor:
    """A projection's output seen as heads."""
    return torch.zeros(2, rows, count * D, dtype=dtype).view(2, rows, count, D).transpose(1, 2)


def call(name: str, D: int, E: int, dtype: str, given: tuple[str, ...]) -> None:
    """Launch one pass of causal attention with the optional parts that are given."""
    kind = DTYPES[dtype]
    q, k, v = heads(T, H, D, kind), heads(S, K, D, kind), heads(S, K, E, kind)
    last = torch.zeros(1, T, dtype=torch.int32)
    parts: dict[str, Any] = {
        "places": torch.zeros(2, T, dtype=torch.int32),
        "sinks": torch.zeros(H),
        "alibi": torch.zeros(H),
    }
    places, sinks, alibi = (parts[n] if n in given else None for n in parts)
    softcap = 30.0 if "softcap" in given else 0.0
    rest = (last, last, places, None, None, None, sinks, alibi, None, 0.125, softcap, 0.0, False)
    if name == "forward":
        _gluon.forward(q, k, v, *rest)
    else:
        o, lse = empty_forward(q, k, v)
        _gluon_backward.backward(o, lse if "dlse" in given else None, q, k, v, o, lse, *rest)


def configuration(
    name: str, D: int, E: int, dtype: str, given: tuple[str, ...], **expected: Any
) -> GluonConfiguration:
    """One specialisation of the kernel `name`."""
    label = "-".join((name, str(D), str(E), dtype, *given))
    build = partial(launched, name, partial(call, name, D, E, dtype, given))
    spilled, in_loops = SPILLED.get(TRITON, {}).get(label, (FEW, 0))
    least = IN_FLIGHT.get(TRITON, {}).get(label, 95)
    return GluonConfiguration(
        label, build, spilled=spilled, spilled_in_loops=in_loops, in_flight=least, **expected
    )


def forward(D: int, E: int, *given: str, dtype: str = "bf16") -> GluonConfiguration:
    """q k^T from shared memory, p v from registers; masked, whole and masked tiles of keys."""
    keys = forward_blocks(D, E).keys
    scores = [(width, keys, "SS") for width in boxes(D)]
    values = [(keys, width, "RS") for width in boxes(E)]
    matrix = (wgmma(*scores, *values),)
    return configuration("forward", D, E, dtype, given, loops=6, matrix=matrix)


def backward_q(D: int, E: int, *given: str, dtype: str = "bf16") -> GluonConfiguration:
    """q k^T and do v^T from shared memory, ds k from registers."""
    keys = blocks_for(D, E, not {"alibi", "softcap"}.isdisjoint(given))[0].keys
    scores = [(width, keys, "SS") for width in (*boxes(D), *boxes(E))]
    sums = [(keys, width, "RS") for width in boxes(D)]
    matrix = (wgmma(*scores, *sums),)
    return configuration("backward_q", D, E, dtype, given, loops=2, matrix=matrix)


def backward_kv(D: int, E: int, *given: str, dtype: str = "bf16") -> GluonConfiguration:
    """k q^T and v do^T from shared memory, p^T do and ds^T q from registers; numbers of rows are
    read where copies put them.
    """
    block = blocks_for(D, E, not {"alibi", "softcap"}.isdisjoint(given))[1]
    s = [(width, block.queries, "SS") for width in boxes(D)]
    dp = [(width, block.queries, "SS") for width in boxes(E)]
    dv = [(block.queries, width, "RS") for width in boxes(E)]
    dk = [(block.queries, width, "RS") for width in boxes(D)]
    # where two warpgroups share keys, one makes dv and the other dk
    matrix = (wgmma(*s, *dv), wgmma(*s, *dp, *dk)) if block.shared else (wgmma(*s, *dp, *dv, *dk),)
    reads = block.queries // 2
    return configuration(
        "backward_kv", D, E, dtype, given, loops=2, matrix=matrix, shared_accesses=reads
    )


def shipped() -> Iterator[GluonConfiguration]:
    """Every row of the tables, and every optional part once or twice."""
    for block in FORWARD:
        yield forward(block.D, block.E)
    yield forward(80, 80)
    yield forward(128, 128, dtype="fp16")
    for given in (("sinks",), ("alibi",), ("alibi", "places"), ("softcap",)):
        yield forward(128, 128, *given)
    yield forward(64, 64, "alibi")
    yield forward(256, 256, "softcap")
    for backward in (backward_q, backward_kv):
        for D, E in ((64, 64), (128, 128), (192, 128), (256, 256)):
            yield backward(D, E)
            yield backward(D, E, "softcap")
        for D, E in ((80, 80), (96, 96), (160, 160), (192, 192)):
            yield backward(D, E)
        yield backward(128, 128, dtype="fp16")
        yield backward(128, 128, "alibi")
    yield backward_q(128, 128, "dlse")


CONFIGURATIONS = list(shipped())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: GluonConfiguration) -> None:
    verify("attention_gluon", configuration, "sm_90")


def test_baseline_is_whole() -> None:
    assert covered("attention_gluon", CONFIGURATIONS) == []
