"""Bugs planted in the Triton attention, forward and backward: all are caught.

Every third by default, all of them with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import swathe.kernels.attention._triton as launchers
import swathe.kernels.attention._triton_backward as backward
import swathe.kernels.attention._triton_forward as forward
import swathe.kernels.attention._triton_rows as rows
import swathe.kernels.attention._triton_tiles as tiles
from support.mutants import Mutant, caught, planted
from swathe.kernels.attention.contract import CONTRACT, random
from swathe.kernels.attention.op import fused
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Case, Problem, bound_of, measure
from swathe.kernels.core.registry import Backend, register_backend, registered, unregister_backend
from swathe.kernels.core.testing import ContractBroken, Report

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

TILES: dict[str, tuple[str, str, int]] = {
    "rows past the end read": ("piece = tl.load(at + d, live[:, None], other=0.0)", "piece = tl.load(at + d)", 0),
    "dead rows undefined": ("piece = tl.load(at + d, live[:, None], other=0.0)", "piece = tl.load(at + d, live[:, None])", 0),
    "features past the head read": ("live[:, None] & (d < x.features), other=0.0", "live[:, None], other=0.0", 0),
    "second piece from the first's place": ("begin += WIDTHS[i]\n    return pieces", "begin += 0\n    return pieces", 0),
    "tail stored past the rows": ("(row < x.rows) & (d < x.features)", "d < x.features", 0),
    "tail stored past the features": ("(row < x.rows) & (d < x.features)", "row < x.rows", 0),
    "last rows never stored": ("(row < x.rows) & (d < x.features)", "(row < x.rows // 16 * 16) & (d < x.features)", 0),
    "only the first piece multiplied": ("tl.static_range(1, len(a))", "tl.static_range(1, 1)", 0),
    "first key of a row off by one": ("visible = (n >= rows.first)", "visible = (n > rows.first)", 0),
    "last key of a row off by one": ("& (n < rows.last)", "& (n <= rows.last)", 0),
    "bounds of the first row": ("at = bounds.skip + index * bounds.row", "at = bounds.skip + index * 0", 0),
    "bounds of the first sequence": ("at = bounds.skip + index * bounds.row", "at = index * bounds.row", 0),
    "bias after the softcap's log": ("z += bias\n", "z += bias * LOG2E\n", 0),
    "ALiBi the wrong way": ("(n - rows.place).to(tl.float32)", "(rows.place - n).to(tl.float32)", 0),
    "ALiBi from the first key": ("place = index + bounds.shift", "place = index", 0),
    "slope of the first head": ("tl.load(scores.alibi.at + scores.alibi.skip)", "tl.load(scores.alibi.at)", 0),
    "softcap forgotten": ("z = t * scores.softcap", "z = z * 1.0", 0),
    "natural logarithm": ("        factor = LOG2E\n", "        factor = 1.0\n", 0),
    "head of another group": ("(h // groups).to(tl.int64)", "(h % (H // groups)).to(tl.int64)", 0),
}  # fmt: skip
FORWARD: dict[str, tuple[str, str, int]] = {
    "sum not shrunk": ("total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)", 0),
    "accumulator not shrunk in the loop": ("acc = scaled(acc, shrink[:, None])\n        acc = _gather", "acc = _gather", 0),
    "peak of the tile alone": ("higher = tl.maximum(peak, tl.max(z, 1) * factor)", "higher = tl.max(z, 1) * factor", 0),
    "no peak subtracted": ("tl.exp2(z * factor - base[:, None])", "tl.exp2(z * factor)", 0),
    "peak begins at 0": ('peak, total = tl.full((M,), float("-inf"), tl.float32)', "peak, total = tl.zeros((M,), tl.float32)", 0),
    "no guard for rows that saw nothing": ('base = tl.where(higher == float("-inf"), 0.0, higher)', "base = higher", 0),
    "scores of this tile with the next's": ("        s = s_ahead\n", "        s = s\n", 0),
    "next tile is this one": ("k_ahead = load_tile(k, start + BLOCK_S,", "k_ahead = load_tile(k, start,", 0),
    "last tile left out": ("final = (hi - 1) // BLOCK_S * BLOCK_S", "final = (hi - 1) // BLOCK_S * BLOCK_S - BLOCK_S", 0),
    "tiles in part taken for whole": ("tl.min(tl.where(rows.live, rows.last, S)) // BLOCK_S", "tl.max(rows.last) // BLOCK_S", 0),
    "window's edge taken for whole": ("tl.cdiv(tl.max(tl.where(rows.live, rows.first, 0)), BLOCK_S)", "tl.cdiv(tl.min(rows.first), BLOCK_S)", 0),
    "sink of the first head": ("tl.load(sinks_ptr + h)", "tl.load(sinks_ptr)", 0),
    "sink in base e": ("tl.load(sinks_ptr + h).to(tl.float32) * LOG2E", "tl.load(sinks_ptr + h).to(tl.float32)", 0),
    "lse in base e": ("peak + tl.log2(safe)", "(peak + tl.log2(safe)) * 0.6931471805599453", 0),
    "values with the keys' strides": ("v_ptr += b * v_b + g * v_h", "v_ptr += b * k_b + g * k_h", 0),
    "lse of rows that are not there": ("T + row, lse, row < T)", "T + row, lse)", 0),
}  # fmt: skip
BACKWARD: dict[str, tuple[str, str, int]] = {
    "delta ignored": ("dz = p * (dp - delta)", "dz = p * dp", 0),
    "softcap's slope ignored": ("ds = dz * (1.0 - t * t)", "ds = dz", 0),
    "lse's gradient added": ("delta -= tl.load(dlse_at", "delta += tl.load(dlse_at", 0),
    "lse times log2(e) again": ('float("inf"), lse)', 'float("inf"), lse * LOG2E)', 0),
    "dq without its scale": ("scaled(dq, scale)", "dq", 0),
    "dk without its scale": ("scaled(dk, scale)", "dk", 0),
    "dq's last keys left out": ("whole_to if part == 1 else hi,", "whole_to,", 0),
    "dq's first keys left out": ("lo if part == 0 else whole_from if", "whole_from if part == 0 else whole_from if", 0),
    "one head of the group": ("range(0, groups * count)", "range(0, count)", 0),
    "first rows not reached": ("lo, count = lo * RATIO, ", "lo, count = lo * RATIO + 1, ", 0),
    "last rows not reached": ("tl.maximum(hi - lo, 0) * RATIO", "tl.maximum(hi - lo, 0) * RATIO - 1", 0),
    "reach of half the keys": ("start, start + BLOCK_S, 64)", "start, start + BLOCK_S // 2, 64)", 0),
    "stats of the first head": ("stats = stats_ptr + (b * H + h) * 2 * span + rows.index\n        lse, delta", "stats = stats_ptr + b * H * 2 * span + rows.index\n        lse, delta", 0),
    "every head writes what rows see": ("    if h == 0:\n", "    if h >= 0:\n", 0),
    "dv from ds": ("added(dv, p.to(", "added(dv, ds.to(", 0),
    "bias of one sequence": ("batch * heads * begins", "heads * begins", 0),
    "bias's rows not summed": ("if of_t == 1:\n", "if of_t == 0:\n", 0),
}  # fmt: skip
LAUNCHER: dict[str, tuple[str, str, int]] = {
    "a tile of rows too few": ("(cdiv(T, block.queries) * H * B, 1, 1)", "(max(T // block.queries, 1) * H * B, 1, 1)", 0),
    "a tile of keys too few": ("(cdiv(S, block.keys) * K * B, 1, 1)", "(max(S // block.keys, 1) * K * B, 1, 1)", 0),
}  # fmt: skip
ROWS: dict[str, tuple[str, str, int]] = {
    "top-left instead of bottom-right": ("H // K, S - T, *scores", "H // K, 0, *scores", 0),
}
IMPRECISE: dict[str, tuple[str, str, int]] = {
    "scores rounded": ("    z, t, factor = s, s, scores.scale * LOG2E\n", "    s = s.to(tl.bfloat16).to(tl.float32)\n    z, t, factor = s, s, scores.scale * LOG2E\n", 0),
    "accumulator rounded": ("tl.dot(p, x[i], acc[i], input_precision=PRECISION)", "tl.dot(p, x[i], acc[i], input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)", 0),
}  # fmt: skip
SMALL = Shape("small", 2, 4, 2, 37, 70, 24, 16)
LONG = Shape("long", 1, 2, 1, 150, 250, 40, 24)


def problems() -> Iterator[Problem]:
    """Few, and such that every branch of the kernels is taken."""
    bf16 = torch.bfloat16
    yield random(SMALL, torch.float32, seed=1, kind="scores")
    yield random(LONG, bf16, seed=2, kind="window").given(causal=True, window=8)
    yield random(SMALL, bf16, seed=4, kind="bias")
    yield random(LONG, bf16, seed=3, kind="window").given(causal=True, window=120)
    lengths = torch.tensor([70, 9], dtype=torch.int32)
    yield random(SMALL, bf16, seed=7, kind="causal").given(end=lengths)
    yield random(SMALL._replace(T=70, S=37), bf16, seed=6, kind="causal").map(_opposed)
    row = random(SMALL, torch.float32, seed=5, kind="bias")
    own = {**row.inputs, "bias": row.inputs["bias"][:1, :, :1].clamp(min=-3.0)}
    yield Problem(own, row.arriving, {**row.options, "softcap": 5.0}, "bias of all rows")
    yield random(LONG._replace(D=128, E=128), bf16, seed=8, kind="packed")


def _opposed(t: torch.Tensor) -> torch.Tensor:
    """q and k that point away from each other: every score is far below 0."""
    if t.shape[-1] != SMALL.D:
        return t
    return 6 * t.abs() if t.shape[1] == SMALL.H else -6 * t.abs()


def chain(source: object) -> list[object]:
    """The modules that must be imported anew for a bug in `source`."""
    order = [tiles, forward, backward, rows, launchers]
    return order[order.index(source) + 1 :]


EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 3
TABLES = (
    (tiles, TILES),
    (forward, FORWARD),
    (backward, BACKWARD),
    (rows, ROWS),
    (launchers, LAUNCHER),
)
CASES = [pytest.param(source, bug, id=name) for source, t in TABLES for name, bug in t.items()]


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, launchers.__name__, problems()) is None
    assert imprecise(launchers.__name__) is None


@pytest.mark.parametrize(("source", "mutant"), CASES[::EVERY])
def test_bug_is_caught(source: object, mutant: tuple[str, str, int], tmp_path: Path) -> None:
    with planted(source, Mutant(*mutant), tmp_path, chain(source)) as module:  # type: ignore[arg-type]
        assert caught(CONTRACT, fused, module, problems()) is not None, "nobody noticed"


@pytest.mark.parametrize("mutant", IMPRECISE)
def test_lost_digits_are_caught(mutant: str, tmp_path: Path) -> None:
    with planted(tiles, Mutant(*IMPRECISE[mutant]), tmp_path, chain(tiles)) as module:  # type: ignore[arg-type]
        assert imprecise(module) is not None, "nobody noticed"


def imprecise(module: str) -> str | None:
    """What the pooled ratios say of the launchers in `module`; None if nothing."""
    name = module.replace(".", "_")
    record = registered("attention")["triton"].capabilities
    register_backend(Backend("attention", name, lambda: fused(name, module), record))
    report = Report(name)
    try:
        problem = random(Shape("pool", 1, 2, 2, 90, 300, 64, 64), torch.bfloat16, seed=9)
        measure(CONTRACT, report, Case("", problem), name)
        report.settle(partial(bound_of, CONTRACT))
    except ContractBroken as broken:
        return str(broken)
    finally:
        unregister_backend("attention", name)
    return None
