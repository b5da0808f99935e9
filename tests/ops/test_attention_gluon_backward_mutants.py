"""Bugs planted in attention's backward for Hopper: the contract or the emulator catches all.

Every third by default, all of them with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import swathe.kernels.attention._gluon_backward as launchers
import swathe.kernels.attention._gluon_backward_kv as of_keys
import swathe.kernels.attention._gluon_backward_q as of_queries
import swathe.kernels.attention._gluon_backward_tiles as tiles
from support.attention_gluon_backward import contract_of, misses
from support.gluon import EmulationError, emulated
from support.mutants import Mutant, planted
from swathe.kernels.attention.contract import random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Problem

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are emulated here")

TILES: dict[str, tuple[str, str, int]] = {
    "softcap's slope ignored": ("p * (1.0 - t * t)", "p", 0),
    "lse in base e": ("gl.exp2(z * factor - lse)", "gl.exp2(z * factor - lse * 0.6931471805599453)", 0),
    "stored before the matrix units' proxy sees it": ("    fence_async_shared()\n", "", 0),
    "bytes of half the numbers expected": ("2 * (box_bytes(stats_at)", "(box_bytes(stats_at)", 0),
    "what rows of the first sequence see": ("[2 * b + j, begin]", "[j, begin]", 0),
    "second box stored over the first": ("to[0].block_shape[3]], memory[1]", "0], memory[1]", 0),
}  # fmt: skip
QUERIES: dict[str, tuple[str, str, int]] = {
    "delta ignored": ("slope * (dp - delta)", "slope * dp", 0),
    "lse's gradient added": ("delta -= gl.load(call.dlse", "delta += gl.load(call.dlse", 0),
    "rows that see nothing weigh": ('lse = gl.where(lse == float("-inf"), float("inf"), lse)\n', "lse = lse * 1.0\n", 0),
    "last key of a row off by one": ("(n < rows.last)", "(n <= rows.last)", 0),
    "tiles in part taken for whole": ("start + BLOCK_S > tile.whole_to", "start > tile.whole_to", 0),
    "window's edge taken for whole": ("(start < tile.whole_from) | ", "", 0),
    "k given up before its product is done": ("        dq, _ = landed(added(dq, ds, k.memory, at_k), ds)\n        mbarrier.arrive(k.empty.index(at_k), count=1)\n", "        mbarrier.arrive(k.empty.index(at_k), count=1)\n        dq, _ = landed(added(dq, ds, k.memory, at_k), ds)\n", 0),
    "scores read while they are made": ("warpgroup_mma_wait(len(do.memory), deps=[s])", "warpgroup_mma_wait(len(do.memory) + 1, deps=[s])", 0),
    "q not waited for": ("    mbarrier.wait(rings.q.full.index(INDEX), 0)\n", "", 0),
    "a look past the last tile": (", pred=step + 1 < tiles)", ")", 0),
    "dq without its scale": ("times(dq, call.scale)", "times(dq, 1.0)", 0),
    "features past the head in delta": ("there = live & (feature < call.E)", "there = live & (feature < _FEATURES)", 0),
    "half the features in delta": ("gl.static_range(PASSES)", "gl.static_range((PASSES + 1) // 2)", 0),
    "reach a tile short": ("gl.store(reach_ptr + at + 1, hi)", "gl.store(reach_ptr + at + 1, hi - BLOCK_S)", 0),
    "keys that some see said to be seen by all": ("gl.store(whole_ptr + at + 1, whole_to)", "gl.store(whole_ptr + at + 1, hi)", 0),
    "head of another group": ("g = tile.h // groups", "g = tile.h % groups", 0),
}  # fmt: skip
KEYS: dict[str, tuple[str, str, int]] = {
    "delta ignored": ("slope * (dp - delta)", "slope * dp", 0),
    "first key of a row off by one": ("(n >= first)", "(n > first)", 0),
    "late rows taken for whole": (" | (begin >= turns.whole_to)", "", 0),
    "early rows taken for whole": ("(begin < turns.whole_from) | ", "", 0),
    "a gap in whole tiles": ("whole_to = gl.minimum(whole_to, gl.min(gl.where(broken, tile, tiles), 0))", "whole_to = tiles", 0),
    "rows whose keys begin later left out": ("(low < end)", "(low < start)", 0),
    "numbers of the first head": ("turns.b * H + h, turns.b", "turns.b * H + turns.h, turns.b", 0),
    "slope of the first head": ("begin, h = turns.begin, h + 1", "begin, h = turns.begin, h", 0),
    "q given up before its product is done": ("        dk = done(dk, ds, 0)\n        mbarrier.arrive(q.empty.index(slot), count=1)\n", "        mbarrier.arrive(q.empty.index(slot), count=1)\n        dk = done(dk, ds, 0)\n", 0),
    "ds of the first tile's numbers": ("delta = numbers(rows.stats, 2 * slot + 1, BLOCK_T)", "delta = numbers(rows.stats, 1, BLOCK_T)", 0),
    "numbers not waited for": ("        mbarrier.wait(rows.full.index(slot), full)\n", "", 0),
    "the operand not named by the wait": ("dv = done(dv, p, len(k.memory))", "dv = done(dv, s, len(k.memory))", 0),
    "dk without its scale": ("times(dk, call.scale)", "times(dk, 1.0)", 0),
    "shared keys: scores of this tile with the next's": ("q.memory, ahead)", "q.memory, slot)", 0),
    "shared keys: scores past the last tile": ("gl.minimum(step + 1, turns.count - 1)", "step + 1", 0),
    "shared keys: stored while they are read": ("    sync_warpgroups(_ENOUGH, 256)\n", "", 0),
}  # fmt: skip
LAUNCHERS: dict[str, tuple[str, str, int]] = {
    "a tile of rows too few": ("(cdiv(T, _QUERIES) * H * B, 1, 1)", "(max(T // _QUERIES, 1) * H * B, 1, 1)", 0),
    "a tile of keys too few": ("(cdiv(S, keys) * K * B, 1, 1)", "(max(S // keys, 1) * K * B, 1, 1)", 0),
    "top-left instead of bottom-right": ("H // K, S - T, float", "H // K, 0, float", 0),
    "o by the strides of its memory": ("v, o.transpose(1, 2)", "v, o", 0),
}  # fmt: skip
SMALL = Shape("", 1, 1, 1, 70, 140, 64, 64)


def problems() -> Iterator[Problem]:
    """Few and small, and such that every branch of the kernels is taken."""
    bf16 = torch.bfloat16
    yield random(SMALL._replace(T=200, S=140), bf16, seed=1, kind="causal")
    # rows before, among and behind those that see a whole tile of keys
    window = random(SMALL._replace(T=390, S=390), bf16, seed=2, kind="window")
    yield window.given(causal=True, window=300)
    scores = random(SMALL._replace(B=2, H=2, T=40, S=130, E=24), bf16, seed=3, kind="scores")
    yield scores.given(softcap=2.0)
    # rows of every sequence see keys of their own
    lengths = torch.tensor([30, 140], dtype=torch.int32)
    yield random(SMALL._replace(B=2, T=20, D=80), bf16, seed=4, kind="causal").given(end=lengths)
    yield random(SMALL._replace(H=2, T=130, S=70, D=192, E=128), bf16, seed=5, kind="causal")
    yield random(SMALL._replace(S=70), bf16, seed=6).given(scale=0.0)


def caught(module: str) -> str | None:
    """What the contract or the emulator says of the launcher in `module`; None if nothing."""
    contract = contract_of(sys.modules[module].backward)
    try:
        with emulated(seed=3):
            for problem in problems():
                found = misses(contract, problem)
                if found:
                    return found[0]
    except EmulationError as error:
        return str(error)
    return None


def chain(source: ModuleType) -> list[ModuleType]:
    """The modules that must be imported anew for a bug in `source`."""
    order = [tiles, of_queries, of_keys, launchers]
    return order[order.index(source) + 1 :]


EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 3
TABLES = ((tiles, TILES), (of_queries, QUERIES), (of_keys, KEYS), (launchers, LAUNCHERS))
CASES = [pytest.param(source, bug, id=name) for source, t in TABLES for name, bug in t.items()]


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(launchers.__name__) is None


@pytest.mark.parametrize(("source", "mutant"), CASES[::EVERY])
def test_bug_is_caught(source: ModuleType, mutant: tuple[str, str, int], tmp_path: Path) -> None:
    with planted(source, Mutant(*mutant), tmp_path, chain(source)) as module:
        assert caught(module) is not None, "nobody noticed"
