"""Bugs planted in the Triton kernels of qk_norm_rotary: the contract or the sanitizer sees each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import swathe.kernels.qk_norm_rotary._triton as kernels
from support.mutants import Mutant, apart, caught, planted
from swathe.kernels.core import heads
from swathe.kernels.core.contract import Problem
from swathe.kernels.qk_norm_rotary.contract import CONTRACT, random
from swathe.kernels.qk_norm_rotary.op import fused
from swathe.kernels.qk_norm_rotary.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

MUTANTS: dict[str, tuple[str, str, int]] = {
    "weight without the offset": ("return offset + w1, offset + w2, offset + w3", "return w1, w2, w3", 0),
    "tail's weight without the offset": ("offset + w2, offset + w3", "offset + w2, w3", 0),
    "second half's weight for the first": ("return offset + w1, offset + w2", "return offset + w2, offset + w1", 0),
    "tail left out of the squares": ("squares += tl.sum(tail * tail, 1)", "squares += 0.0", 0),
    "second half left out of the squares": ("tl.sum(x1 * x1 + x2 * x2, 1)", "2 * tl.sum(x1 * x1, 1)", 0),
    "mean over the pairs alone": ("squares / D + eps", "squares / (D - 1) + eps", 0),
    "eps forgotten": ("squares / D + eps", "squares / D", 0),
    "eps outside the root": ("1.0 / tl.sqrt_rn(squares / D + eps)", "1.0 / (tl.sqrt_rn(squares / D) + eps)", 0),
    "xhat not rounded for llama": ("if ROUND_XHAT:", "if False:", 0),
    "xhat rounded for gemma": ("if ROUND_XHAT:", "if ROUND_H:", 0),
    "h not rounded": ("if ROUND_H:", "if False:", 0),
    "h rounded for fp32": ("if ROUND_H:", "if True:", 0),
    "keys with the weight of queries": ("tl.where(of_k, kw_ptr, qw_ptr)", "qw_ptr", 0),
    "keys of the queries": ("tl.where(of_k, k_ptr, q_ptr)", "q_ptr", 0),
    "keys with the strides of queries": ("_where(of_k, k_b, k_h, k_s, q_b, q_h, q_s)", "q_b, q_h, q_s", 0),
    "heads of the queries for keys": ("tl.where(of_k, Hk, H)", "H", 0),
    "groups of keys start among the queries": ("tl.where(of_k, group - q_groups, group) * heads_each", "group * heads_each", 0),
    "last head of a group dropped": ("tl.minimum(first + heads_each, heads)", "tl.minimum(first + heads_each, heads) - 1", 0),
    "tokens past the end": ("b, s, live = m // S, m % S, m < M", "b, s, live = m // S, m % S, m >= 0", 0),
    "sequence and token exchanged": ("b, s, live = m // S, m % S, m < M", "s, b, live = m // S, m % S, m < M", 0),
    "rounded products for all": ("y1, y2 = turned(h1, h2, c1, s1, c2, s2, dtype, ROUND_Y)", "y1, y2 = turned(h1, h2, c1, s1, c2, s2, dtype, True)", 0),
    "products never rounded": ("y1, y2 = turned(h1, h2, c1, s1, c2, s2, dtype, ROUND_Y)", "y1, y2 = turned(h1, h2, c1, s1, c2, s2, dtype, False)", 0),
    "one angle for both members": ("y1, y2 = turned(h1, h2, c1, s1, c2, s2", "y1, y2 = turned(h1, h2, c1, s1, c1, s1", 0),
    "turned before the weight": ("h1 = _scaled(x1, rstd, w1", "h1 = _scaled(x1, rstd, w2", 0),
    "tail not normalised": ("h3 = _scaled(x3, rstd, w3, dtype, ROUND_XHAT, ROUND_H)", "h3 = x3 * w3", 0),
    "dx: turned forward again": ("g1, g2 = dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1", "g1, g2 = dy1 * c1 - dy2 * s1, dy2 * c2 + dy1 * s2", 0),
    "dx: sines not exchanged": ("dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1", "dy1 * c1 + dy2 * s1, dy2 * c2 - dy1 * s2", 0),
    "dx: tail left out of the dot": ("dot += tl.sum(h3 * x3, 1)", "dot += 0.0", 0),
    "dx: weight left out of the dot": ("x1, x2, x3, g1 * w1, g2 * w2, g3 * w3, live", "x1, x2, x3, g1, g2, g3, live", 0),
    "dx: mean not divided": ("(dot * rstd / D)", "(dot * rstd)", 0),
    "dx: rstd left out of the mean": ("(dot * rstd / D)", "(dot / D)", 0),
    "dx: of keys with the queries' weight": ("tl.where(of_k, kw_ptr, qw_ptr)", "qw_ptr", 1),
    "dx: dy's strides are x's": ("dy_at + n * dy_h, live", "dy_at + n * x_h, live", 0),
    "dx: outputs strided as inputs": ("dx_at + n * dx_h, live", "dx_at + n * x_h, live", 0),
    "dw: weighted gradient": ("dw1 += g1 * x1", "dw1 += g1 * w1 * x1", 0),
    "dw: only the last tile": ("dw2 += g2 * x2", "dw2 = g2 * x2", 0),
    "dw: tail forgotten": ("dw3 += g3 * x3", "dw3 += 0.0", 0),
    "dw: keys into the queries' half": ("row + tl.where(of_k, D, 0)", "row", 0),
    "dw: the other half left unwritten": ("one & with_k", "one & (with_k & False)", 0),
    "dw: rows of partials overlap": ("tl.where(Hk > 0, 2 * D, D)", "D", 0),
    "dw: tokens that are not there": ("rstd = tl.where(live, rstd, 0.0)[:, None]", "rstd = rstd[:, None]", 0),
    "a program skips tiles": ("tl.where(of_k, tl.num_programs(0) - q_programs, q_programs)", "tl.num_programs(0)", 0),
    "programs of keys start too late": ("tl.where(of_k, p - q_programs, p)", "p", 0),
}  # fmt: skip
FIRST = Shape("first", 2, 5, 3, 2, 32, 32)
TAIL = Shape("tail", 1, 3, 2, 1, 21, 8)
MANY = Shape("many", 1, 17, 5, 3, 1024, 8)


def problems() -> list[Problem]:
    """Small problems of every kind, q with NaN between its rows."""
    found = [
        random(FIRST, torch.bfloat16, seed=1, group="llama"),
        random(FIRST, torch.bfloat16, seed=2, group="gemma"),
        random(TAIL, torch.float32, seed=3, group="gemma", sequences=True),
        random(TAIL, torch.bfloat16, seed=4, interleaved=True),
        random(TAIL, torch.bfloat16, seed=5, heads_first=True),
        random(FIRST._replace(S=1, Hk=0), torch.float32, seed=6).given(eps=0.0),
        random(FIRST, torch.float32, seed=7).given(eps=0.0),
    ]
    small = found[3]
    tiny = {**small.inputs, "q": small.inputs["q"] * 1e-3}
    found = [_apart(problem) for problem in found]
    return [*found, replace(small, inputs=tiny), random(MANY, torch.float32, seed=9)]


def _apart(problem: Problem) -> Problem:
    return replace(problem, inputs={**problem.inputs, "q": apart(problem.inputs["q"])})


PROBLEMS = problems()


@pytest.fixture(autouse=True)
def two_heads_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small problems too: MANY's groups of heads are two, and keys' last group is one."""
    monkeypatch.setattr(heads, "PROGRAMS", 3)


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, kernels.__name__, PROBLEMS) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(kernels, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, PROBLEMS) is not None, "nobody noticed"
