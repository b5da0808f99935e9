"""The fused attention over two thousand numbered calls, against fp64 and the contract.

Every element of o, lse and each gradient is bounded. Ratios are pooled over the run, for each
output and dtype, but for calls where one key may take all of a row's weight, by steep scores or
for want of others: ds is then a difference of equal numbers, and the rounding of o within delta
more than that of dq.

An evenly spread part runs by default, all of it on a GPU or with HYPOTHESIS_PROFILE=nightly. One
call alone, by its number:

    CASE=1234 pytest tests/ops/test_attention_cases.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from support.attention_cases import Call, calls, drawn, problem, smaller
from support.tensors import DEVICE, DTYPES
from swathe.kernels.attention.contract import CONTRACT
from swathe.kernels.core.contract import Case, bound_of, measure
from swathe.kernels.core.testing import MIN_POOL, Report

CALLS = calls()
PART = 8  # of each dtype
WHOLE = DEVICE == "cuda" or os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def chosen(dtype: torch.dtype) -> list[tuple[int, Call]]:
    """Numbers and calls of one dtype that this run makes."""
    numbered = [(n, call) for n, call in enumerate(CALLS) if call.dtype == dtype]
    if "CASE" in os.environ:
        return [(n, call) for n, call in numbered if n == int(os.environ["CASE"])]
    return numbered if WHOLE else numbered[:: len(numbered) // PART]


def single(call: Call) -> bool:
    """Whether one key may take all of a row's weight."""
    seen = min(n for n in (call.S, call.window, call.chunk) if n is not None)
    return call.amplitude > 1 or seen < 8


def hold(report: Report, number: int, call: Call) -> None:
    """Measure one call; what it raises is a miss like any other."""
    call = call if DEVICE == "cuda" else smaller(call)
    made = problem(call, number, DEVICE)
    case = Case("single" if single(call) else "", replace(made, label=f"{number}, {call}"))
    try:
        measure(CONTRACT, report, case, "triton", backward=call.backward)
    except Exception as error:  # noqa: BLE001
        report.misses.append(f"{number}, {call}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls(dtype: torch.dtype) -> None:
    report = Report(f"attention on 'triton' ({DEVICE})")
    for number, call in chosen(dtype):
        hold(report, number, call)
    # in a part, a small pool is the pool of a single call
    least = MIN_POOL if WHOLE else 10 * MIN_POOL
    report.pools = {
        key: pool
        for key, pool in report.pools.items()
        if pool.count >= least and not pool.name.endswith("single")
    }
    report.settle(partial(bound_of, CONTRACT))


def test_the_list_is_long_and_meets_every_feature() -> None:
    assert len(CALLS) >= 2000 and len(set(CALLS)) >= 2000
    assert drawn(7) == drawn(7)
    values: dict[str, set[Any]] = {n: {getattr(c, n) for c in CALLS} for n in Call._fields}
    assert {80, 96, 112, 160, 192, 256} <= values["D"] and {0, 1, 129} <= values["T"]
    assert any((c.D, c.E) == (192, 128) for c in CALLS)
    for name in ("causal", "window", "ahead", "chunk", "softcap", "documents", "page", "layout"):
        assert len(values[name]) > 1, name
    parts = {name for c in CALLS for name in c.parts}
    assert {"start", "end", "prefix", "keys", "allowed", "seq_lens", "alibi", "sinks", "bias",
            "bias with holes"} <= parts  # fmt: skip
    assert values["dtype"] == set(DTYPES) and values["backward"] == {True, False}


def test_smaller_calls_keep_remainders_and_order() -> None:
    for call in CALLS:
        small = smaller(call)
        assert (small.T > small.S) == (call.T > call.S) and (small.T == small.S) == (
            call.T == call.S
        )
        tile = 32
        assert small.T % tile == call.T % tile and small.S % tile == call.S % tile
        assert small.H % small.K == 0
