"""Planted bugs in decoding on Hopper: each is found by the emulator or in the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.decode_cases import NAN, Case, check
from support.gluon import EmulationError
from support.gluon_decoding import run
from support.mutants import Mutant, planted
from support.tensors import DEVICE, rows
from swathe.kernels.attention import _gluon_decode as decoding
from swathe.kernels.attention import _gluon_decode_split as splits
from swathe.kernels.attention import _gluon_splits as shared

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the emulator computes on a CPU")
bf16 = torch.bfloat16

MUTANTS = {
    "queries without a fence": Mutant(
        "t < call.T, begin)\n    fence_async_shared()\n", "t < call.T, begin)\n"
    ),
    "zeroed values without a fence": Mutant(
        "gl.zeros_like(rows)))\n        fence_async_shared()\n", "gl.zeros_like(rows)))\n"
    ),
    "values before their phase": Mutant(
        "    mbarrier.wait(v.full.index(slot), full)\n    _clear(v.memory, slot, final",
        "    _clear(v.memory, slot, final",
    ),
    "keys never given back": Mutant(
        "    mbarrier.arrive(k.empty.index(slot), count=1)\n    p, _", "    p, _"
    ),
    "values given back before their product": Mutant(
        "    acc, _ = landed(added(acc, p, v.memory, slot), p)\n"
        "    mbarrier.arrive(v.empty.index(slot), count=1)\n",
        "    mbarrier.arrive(v.empty.index(slot), count=1)\n"
        "    acc, _ = landed(added(acc, p, v.memory, slot), p)\n",
    ),
    "values given back twice": Mutant(
        "    mbarrier.arrive(v.empty.index(slot), count=1)\n    return acc",
        "    mbarrier.arrive(v.empty.index(slot), count=2)\n    return acc",
    ),
    "the copying warp is a step ahead": Mutant("        step += 1\n\n\n@jit\ndef _clear", "\n\n@jit\ndef _clear"),
    "values of the tile before": Mutant("fill(v, v_at, before, unit.g, behind", "fill(v, v_at, page, unit.g, row"),
    "what lies past the last key": Mutant("    _clear(v.memory, slot, final * BLOCK_S, parts.lo, parts.hi, BLOCK_S)\n", ""),
    "what lies before the first key": Mutant("    _clear(v.memory, slot, low * BLOCK_S, parts.lo, parts.hi, BLOCK_S)\n", ""),
    "the next split's first key": Mutant("start + parts.each, parts.hi", "start + parts.each + 1, parts.hi"),
    "another head's slope": Mutant("unit.g * call.groups + r % call.groups\n    return gl.expand_dims(gl.load", "r % call.groups\n    return gl.expand_dims(gl.load"),
    "a sink in every split": Mutant("alone = count == 1", "alone = count >= 1"),
    "queries of the next row": Mutant("h.to(gl.int64) * call.q_h + t.to", "h.to(gl.int64) * call.q_h + (t + 1).to"),
    "rows of another head": Mutant("at = out * call.splits + split", "at = out * call.splits"),
}  # fmt: skip


def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard call, of more tiles a program than stages, holds over three schedules."""
    monkeypatch.setattr(decoding, "PROGRAMS", 1)
    monkeypatch.setattr(decoding, "multiprocessors", lambda _: 1)
    case = Case((1500, 290), 32, 2, 2, 1536, 64, 64, bf16)
    q, k, v = case.inputs()
    # slopes so slight that the first keys count as the last do
    slopes, sinks = 2.0**-12 * torch.arange(1.0, 33), rows(32, seed=5)
    mask = replace(case.mask, start=torch.tensor([7, 3]))
    k[:, :, :3], v[:, :, :3] = NAN, NAN
    for seed in range(3):
        o, lse, _ = run(q, k, v, mask, seed=seed, alibi=slopes, sinks=sinks)
        check(o, lse, q, k, v, mask, alibi=slopes, sinks=sinks)


def test_unplanted_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    held(monkeypatch)


def home(mutant: Mutant) -> ModuleType:
    """The file that the bug is planted in."""
    return next(m for m in (splits, shared) if mutant.old in Path(str(m.__file__)).read_text())


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, caught = home(MUTANTS[name]), (AssertionError, EmulationError)
    with planted(source, MUTANTS[name], tmp_path), pytest.raises(caught):
        held(monkeypatch)
