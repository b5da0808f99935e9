"""Bugs planted in attention's forward for Hopper: the contract or the emulator catches each.

Every fourth by default, all of them with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

import swathe.kernels.attention._gluon as launchers
import swathe.kernels.attention._gluon_forward as forward
import swathe.kernels.attention._gluon_tiles as tiles
from support.attention_gluon import misses
from support.gluon import EmulationError, emulated
from support.mutants import Mutant, planted
from swathe.kernels.attention.contract import random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Problem

TILES: dict[str, tuple[str, str, int]] = {
    "first key of a row off by one": ("(n >= rows.first)", "(n > rows.first)", 0),
    "last key of a row off by one": ("(n < rows.last)", "(n <= rows.last)", 0),
    "bounds of the first row": ("bounds.skip + index * bounds.row", "bounds.skip + index * 0", 0),
    "bounds of the first sequence": ("bounds.skip + index * bounds.row", "index * bounds.row", 0),
    "whole tiles from too early on": ("gl.cdiv(whole_from, BLOCK_S)", "whole_from // BLOCK_S", 0),
    "whole tiles for too long": ("whole_to // BLOCK_S, final", "gl.cdiv(whole_to, BLOCK_S), final", 0),
    "first tile of keys left out": ("low = gl.minimum(low // BLOCK_S, final)", "low = gl.minimum(low // BLOCK_S + 1, final)", 0),
    "last tile of keys left out": ("final = gl.maximum(high - 1, 0) // BLOCK_S", "final = gl.maximum(high - BLOCK_S, 0) // BLOCK_S", 0),
    "sum not shrunk": ("total * shrink + gl.sum(p, 1)", "total + gl.sum(p, 1)", 0),
    "peak of the tile alone": ("gl.maximum(peak, gl.max(z, 1) * factor)", "gl.max(z, 1) * factor", 0),
    "no guard for rows that saw nothing": ('base = gl.where(higher == float("-inf"), 0.0, higher)', "base = higher", 0),
    "sink without weight": ("total += gl.where(sink > float(\"-inf\"), 1.0, 0.0)", "total += 0.0", 0),
    "sink of the first head": ("gl.load(sinks_ptr + h)", "gl.load(sinks_ptr)", 0),
    "softcap forgotten": ("z = t * scores.softcap", "z = s * scores.scale", 0),
    "ALiBi the wrong way": ("(n - rows.place).to(gl.float32)", "(rows.place - n).to(gl.float32)", 0),
    "natural logarithm": ("        factor = LOG2E\n", "        factor = 1.0\n", 0),
    "one phase for all turns of a ring": ("(step // STAGES) & 1", "step * 0", 0),
    "slots filled before they are empty": ("    mbarrier.wait(ring.empty.index(slot), phase ^ 1)\n", "", 0),
    "only the first piece multiplied": ("gl.static_range(1, len(a))", "gl.static_range(1, 1)", 0),
    "second piece from the first's features": ("[b, h, row, second]", "[b, h, row, 0]", 0),
    "bytes of one piece": ("box_bytes(descriptors[0]) + box_bytes(descriptors[1])", "box_bytes(descriptors[0])", 0),
    "head of another section": ("begin + rest % width", "rest % width", 0),
}  # fmt: skip
FORWARD: dict[str, tuple[str, str, int]] = {
    "values of the next tile": ("(final - i) * BLOCK_S, step, STAGES", "(final - i - 1) * BLOCK_S, step, STAGES", 0),
    "head of another group": ("g = h // call.groups", "g = h % (call.H // call.groups)", 0),
    "a tile skipped": ("+ gl.num_programs(0)", "+ gl.num_programs(0) + 1", 0),
    "a tile taken twice": ("+ gl.num_programs(0)", "+ gl.num_programs(0) - 1", 0),
    "an order overwritten before it is read": ("    mbarrier.wait(board.empty, (turn & 1) ^ 1)\n", "", 0),
    "keys used before they are there": ("full, pred=tile > low", "full, pred=tile < low", 0),
    "keys given back before they are read": ("        s = warpgroup_mma_wait(len(acc), deps=[s])\n        mbarrier.arrive(k.empty.index(slot), count=1)\n", "        mbarrier.arrive(k.empty.index(slot), count=1)\n        s = warpgroup_mma_wait(len(acc), deps=[s])\n", 0),
    "scores read before they are there": ("warpgroup_mma_wait(len(acc), deps=[s])", "warpgroup_mma_wait(len(acc) + 1, deps=[s])", 0),
    "values used before they are there": ("        mbarrier.wait(v.full.index(before), full)\n", "", 0),
    "values never given back": ("        mbarrier.arrive(v.empty.index(before), count=1)\n", "", 0),
    "weights that the wait does not name": ("deps=[acc[0], p, following]", "deps=[acc[0], following, following]", 0),
    "accumulator not shrunk": ("        acc = scaled(acc, shrink)\n", "", 0),
    "rows of the first warpgroup": ("    begin = order.begin + INDEX * GROUP\n", "    begin = order.begin\n", 0),
    "the first tile of keys unmasked": ("SCORED, SOFTCAP, True, BLOCK_S", "SCORED, SOFTCAP, False, BLOCK_S", 0),
    "no stretch is masked": ("SCORED, SOFTCAP, part != 1,", "SCORED, SOFTCAP, part == 3,", 0),
    "o stored without a fence": ("    fence_async_shared()\n", "", 0),
    "o overwritten before it is stored": ("            tma_store_wait(0)\n            partition_barrier()\n", "            partition_barrier()\n", 0),
    "q taken back before o is stored": ("            _write(INDEX, work, order, acc)\n            tma_store_wait(0)\n", "            _write(INDEX, work, order, acc)\n", 0),
    "lse past the rows": ("rows.index < call.T)", "rows.index < call.T + 1)", 0),
    "lse of the first head": ("(order.b * call.H + order.h).to(gl.int64)", "(order.b * call.H).to(gl.int64)", 0),
    "slope of the first head": ("order.b * call.alibi_b + order.h", "order.b * call.alibi_b", 0),
}  # fmt: skip
LAUNCHER: dict[str, tuple[str, str, int]] = {
    "the counter begins at 1": ("torch.zeros(1,", "torch.ones(1,", 0),
    "ALiBi from the first key": ("torch.arange(S - T, S,", "torch.arange(0, T,", 0),
}  # fmt: skip


def problems() -> Iterator[Problem]:
    """Few and small, and such that every branch of the kernel is taken."""
    bf16 = torch.bfloat16
    yield random(Shape("", 1, 2, 1, 130, 290, 16, 16), bf16, seed=1, kind="causal")
    yield random(Shape("", 2, 2, 2, 66, 140, 16, 16), bf16, seed=2, kind="scores")
    window = random(Shape("", 1, 4, 2, 140, 540, 16, 16), bf16, seed=3, kind="window")
    yield window.given(causal=True, window=330)
    rows = random(Shape("", 2, 1, 1, 200, 140, 48, 48), bf16, seed=4, kind="causal")
    rows.inputs["v"][:, :, 0] = 0.0
    yield rows.given(start=torch.tensor([[3], [70]]).expand(2, 200))
    yield random(Shape("", 1, 3, 1, 140, 150, 192, 128), bf16, seed=5, kind="causal")


def fault(module: ModuleType) -> str | None:
    """What the contract or the emulator says of the launchers in `module`; None if nothing."""
    # several tiles a program, and a section that is not all heads
    module.multiprocessors = lambda _: 2  # type: ignore[attr-defined]
    module.SECTION = 2 * 140 * 2 * 96  # type: ignore[attr-defined]
    try:
        for seed, problem in enumerate(problems()):
            with emulated(seed=seed):
                found = misses(module, problem)
            if found:
                return found[0]
    except (EmulationError, AssertionError) as error:
        return str(error)
    return None


def chain(source: ModuleType) -> Sequence[ModuleType]:
    """The modules that must be imported anew for a bug in `source`."""
    order = [tiles, forward, launchers]
    return order[order.index(source) + 1 :]


EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 4
TABLES = ((tiles, TILES), (forward, FORWARD), (launchers, LAUNCHER))
CASES = [pytest.param(source, bug, id=name) for source, t in TABLES for name, bug in t.items()]


def test_the_kernel_as_it_is_passes(tmp_path: Path) -> None:
    same = Mutant("_GROUP = 64", "_GROUP = 64")
    with planted(launchers, same, tmp_path) as module:
        assert fault(sys.modules[module]) is None


@pytest.mark.parametrize(("source", "mutant"), CASES[::EVERY])
def test_bug_is_caught(source: ModuleType, mutant: tuple[str, str, int], tmp_path: Path) -> None:
    with planted(source, Mutant(*mutant), tmp_path, chain(source)) as module:
        assert fault(sys.modules[module]) is not None, "nobody noticed"
