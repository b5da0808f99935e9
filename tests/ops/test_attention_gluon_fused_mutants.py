"""Bugs planted in attention's backward in a single pass: the contract or the emulator catches all.

Every third by default, all of them with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import swathe.kernels.attention._gluon_backward_fused as kernel
import swathe.kernels.attention._gluon_fused as launchers
from support.attention_gluon_backward import contract_of
from support.gluon import EmulationError, emulated
from support.mutants import Mutant, planted
from swathe.kernels.attention.contract import random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Case, Problem, bound_of, measure
from swathe.kernels.core.testing import ContractBroken, Report

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are emulated here")

KERNEL: dict[str, tuple[str, str, int]] = {
    "delta ignored": ("slope * (dp - delta)", "slope * dp", 0),
    "ds read before the other has written it": ("        fence_async_shared()\n        sync_warpgroups(_BOTH, 256)\n", "        fence_async_shared()\n", 0),
    "ds written without a fence": ("        fence_async_shared()\n        sync_warpgroups(_BOTH, 256)\n", "        sync_warpgroups(_BOTH, 256)\n", 0),
    "ds in one half at every step": ("half = 2 * (step % 2)", "half = 0 * step", 0),
    "one warpgroup's keys for dq": ("for i in gl.static_range(2):\n        rows = ds", "for i in gl.static_range(1):\n        rows = ds", 0),
    "keys of the other warpgroup": ("tile_of(k[INDEX], anew(i, step))", "tile_of(k[INDEX], anew(1 - i, step))", 0),
    "the other half of the features": ("INDEX * to.block_shape[3]", "(1 - INDEX) * to.block_shape[3]", 0),
    "dq written over while it leaves": ("    tma_store_wait(0)\n    partition_barrier()\n", "    partition_barrier()\n", 0),
    "dq leaves before copies see it": ("    fence_async_shared()\n    partition_barrier()\n    tma_add", "    partition_barrier()\n    tma_add", 0),
    "dq read while it is made": ("dq = warpgroup_mma_wait(len(k.memory), deps=[dq])", "dq = warpgroup_mma_wait(len(k.memory) + 1, deps=[dq])", 0),
    "do given up before its product is done": ("done(dv, p, 2 + len(k.memory))", "done(dv, p, 3 + len(k.memory))", 0),
    "q given up before its product is done": ("        dk = done(dk, ds, 0)\n        mbarrier.arrive(q.empty.index(slot), count=1)\n", "        mbarrier.arrive(q.empty.index(slot), count=1)\n        dk = done(dk, ds, 0)\n", 0),
    "keys stored over while they are read": ("    sync_warpgroups(_BOTH, 256)\n    store(dk_at", "    store(dk_at", 0),
    "dq of the first head": ("dq, turns.b, h, begin)", "dq, turns.b, turns.h, begin)", 0),
    "dk without its scale": ("times(dk, call.scale)", "times(dk, 1.0)", 0),
    "numbers of half the rows": ("gl.static_range(ROWS // GROUP)", "gl.static_range(1)", 0),
    "numbers of the first rows twice": ("own.begin + i * GROUP", "own.begin", 0),
}  # fmt: skip
LAUNCHERS: dict[str, tuple[str, str, int]] = {
    "dq without its scale": ("torch.mul(total, float(rows.scale), out=dq)", "torch.mul(total, 1.0, out=dq)", 0),
    "dq added to what was there": ("torch.zeros(q.shape", "torch.ones(q.shape", 0),
    "a tile of keys too few": ("(cdiv(S, 2 * _GROUP) * K * B, 1, 1)", "(max(S // 128, 1) * K * B, 1, 1)", 0),
    "a tile of rows too few": ("(cdiv(T, 2 * _GROUP) * H * B, 1, 1)", "(max(T // 128, 1) * H * B, 1, 1)", 0),
    "features of half a head in delta": ("(cdiv(E, 64),)", "(cdiv(E, 128),)", 0),
}  # fmt: skip
SMALL = Shape("", 1, 1, 1, 70, 140, 64, 64)


def problems() -> Iterator[Problem]:
    """As small as pools of errors can be, and such that every branch of the kernels is taken."""
    bf16 = torch.bfloat16
    yield random(SMALL._replace(T=200, S=180), bf16, seed=1, kind="causal")
    yield random(SMALL._replace(B=2, H=2, T=90, S=130), bf16, seed=3, kind="scores")
    yield random(SMALL._replace(T=100, S=200, D=128, E=128), bf16, seed=5, kind="causal")


def caught(module: str) -> str | None:
    """What the contract or the emulator says of the launcher in `module`; None if nothing."""
    contract = contract_of(sys.modules[module].backward)
    try:
        for number, problem in enumerate(problems()):
            report = Report("planted")
            with emulated(seed=number):
                measure(contract, report, Case("", problem), "gluon")
            report.settle(partial(bound_of, contract))
    except (EmulationError, ContractBroken) as error:
        return str(error)
    return None


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(launchers.__name__) is None


EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 3
PLANTED = [
    pytest.param(source, bug, id=name)
    for source, table in ((kernel, KERNEL), (launchers, LAUNCHERS))
    for name, bug in table.items()
]


@pytest.mark.parametrize(("source", "mutant"), PLANTED[::EVERY])
def test_bug_is_caught(source: ModuleType, mutant: tuple[str, str, int], tmp_path: Path) -> None:
    chain = [launchers] if source is kernel else []
    with planted(source, Mutant(*mutant), tmp_path, chain) as module:
        assert caught(module) is not None, "nobody noticed"
