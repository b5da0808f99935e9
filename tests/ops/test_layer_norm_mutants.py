"""Bugs planted in the Triton kernels of LayerNorm: the contract and the sanitizer catch every one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import swathe.kernels.layer_norm._triton as kernels
from support.mutants import Mutant, apart, caught, planted
from support.tensors import rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.layer_norm.contract import CONTRACT, random
from swathe.kernels.layer_norm.op import fused
from swathe.kernels.layer_norm.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

_LIVE = "live = (m < M)[:, None] & (n < N)[None, :]"
MUTANTS: dict[str, tuple[str, str, int]] = {
    "load past the rows": (_LIVE, "live = (n < N)[None, :]", 0),
    "load past the features": (_LIVE, "live = (m < M)[:, None] & (n < BLOCK_N)[None, :]", 0),
    "residual not added": ("(h.to(tl.float32) + r.to(tl.float32))", "(h.to(tl.float32))", 0),
    "h not rounded before its statistics": (
        ".to(h_ptr.dtype.element_ty)\n        tl.store(h_ptr + dense, h, live)",
        "\n        tl.store(h_ptr + dense, h.to(h_ptr.dtype.element_ty), live)",
        0,
    ),
    "mean not taken off": ("centred = tl.where(live, h - mean[:, None], 0.0)", "centred = h", 0),
    "dead lanes in the variance": ("centred = tl.where(live, h - mean[:, None], 0.0)", "centred = h - mean[:, None]", 0),
    "variance with N - 1": ("tl.sum(centred * centred, 1) / N", "tl.sum(centred * centred, 1) / (N - 1)", 0),
    "eps forgotten": ("tl.sum(centred * centred, 1) / N + eps", "tl.sum(centred * centred, 1) / N", 0),
    "eps outside the root": ("1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)", "1.0 / (tl.sqrt_rn(tl.sum(centred * centred, 1) / N) + eps)", 0),
    "weight left out": ("y *= tl.load(w_ptr + n, n < N", "y *= 0 * tl.load(w_ptr + n, n < N", 0),
    "bias scaled": ("y += tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)", "y += rstd[:, None] * tl.load(b_ptr + n, n < N, other=0.0).to(tl.float32)", 0),
    "bias for the weight": ("y += tl.load(b_ptr + n, n < N", "y += tl.load(w_ptr + n, n < N", 0),
    "mean and rstd exchanged": ("tl.store(statistics_ptr + M + m, rstd, m < M)", "tl.store(statistics_ptr + M + m, mean, m < M)", 0),
    "statistics stored past the end": ("tl.store(statistics_ptr + M + m, rstd, m < M)", "tl.store(statistics_ptr + M + m, rstd)", 0),
    "row stride ignored": ("x_ptr + m[:, None] * x_stride", "x_ptr + m[:, None] * N", 0),
    "wide: last tile dropped": ("for start in range(0, N, BLOCK_N):", "for start in range(0, N - BLOCK_N, BLOCK_N):", 0),
    "wide: second pass shifted": ("for start in range(0, N, BLOCK_N):", "for start in range(BLOCK_N, N, BLOCK_N):", 1),
    "wide: every tile counts alike": ("count = tl.minimum(N - start, BLOCK_N).to(tl.float32)", "count = BLOCK_N + 0.0", 0),
    "wide: spread of the tiles' means": ("+ shift * shift * (start * (count / total))", "+ 0.0", 0),
    "wide: mean of the last tile": ("step = shift * (count / total)", "step = shift", 0),
    "wide: h of the inputs again": ("h = tl.load(h_ptr + m * N + n, live, other=0.0)", "h = tl.load(x_ptr + m * x_stride + n, live, other=0.0)", 0),
    "dx: mean of g dropped": ("(tl.sum(g, 1) / N)[:, None]", "0.0", 0),
    "dx: mean of dy for that of g": ("(tl.sum(g, 1) / N)[:, None]", "(tl.sum(dy, 1) / N)[:, None]", 0),
    "dx: projection dropped": ("- xhat * along)\n        if ADD:\n            dh_at", ")\n        if ADD:\n            dh_at", 0),
    "dx: projection not divided": ("(tl.sum(g * xhat, 1) / N)", "tl.sum(g * xhat, 1)", 0),
    "dx: xhat of dead lanes": ("tl.where(live, (h - mean) * rstd, 0.0)", "(h - mean) * (rstd + 1e30)", 0),
    "dx: mean not taken off": ("(h - mean) * rstd, 0.0)", "h * rstd, 0.0)", 0),
    "dx: dh not added": ("dx += tl.load(dh_at, live, other=0.0).to(tl.float32)", "dx += 0.0", 0),
    "dw: weighted gradient": ("            dw += dy * xhat\n            db += dy\n\n    if SUMS:\n        at = partial_ptr + tl.cast(p, tl.int64) * 2 * N + n\n        tl.store(at, tl.sum(dw", "            dw += g * xhat\n            db += dy\n\n    if SUMS:\n        at = partial_ptr + tl.cast(p, tl.int64) * 2 * N + n\n        tl.store(at, tl.sum(dw", 0),
    "dw: only the last tile": ("            dw += dy * xhat\n", "            dw = dy * xhat\n", 0),
    "db: weighted gradient": ("            db += dy\n", "            db += g\n", 0),
    "db: of xhat": ("            db += dy\n", "            db += xhat\n", 0),
    "sums: db over dw": ("tl.store(at + N, tl.sum(db, 0), n < N)", "tl.store(at, tl.sum(db, 0), n < N)", 0),
    "sums: programs share a row": ("at = partial_ptr + tl.cast(p, tl.int64) * 2 * N + n", "at = partial_ptr + tl.cast(p, tl.int64) * N + n", 0),
    "sums: a program skips tiles": ("tl.cdiv(M, BLOCK_M), tl.num_programs(0)", "tl.cdiv(M, BLOCK_M), tl.num_programs(0) + 1", 0),
    "wide dx: mean of g not divided": ("tl.store(dots_ptr + m, tl.sum(whole, 0) / N)", "tl.store(dots_ptr + m, tl.sum(whole, 0))", 0),
    "wide dx: rstd left out of the dot": ("tl.sum(along, 0) * rstd / N", "tl.sum(along, 0) / N", 0),
    "wide dx: mean left in the dot": ("along += g * (h - mean)", "along += g * h", 0),
    "wide dx: weight left out of the dot": ("g *= tl.load(w_ptr + n, live, other=0.0).to(tl.float32)", "g *= 1.0", 0),
    "wide dx: columns of the first tile": ("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)\n    p =", "n = tl.arange(0, BLOCK_N)\n    p =", 0),
    "wide dw: rows skipped": ("for row in range(p, M, tl.num_programs(1)):", "for row in range(p + 1, M, tl.num_programs(1)):", 0),
}  # fmt: skip
# what rows far from zero lose; the contract's bounds, which grow with |x|, let it pass
FAR: dict[str, tuple[str, str, int]] = {
    "digits lost by the mean": ("lost = tl.sum(centred, 1) / N", "lost = tl.sum(centred, 1) * 0", 0),
    "wide: digits lost by the mean": ("lost = tl.sum(off, 0) / count", "lost = tl.sum(off, 0) * 0", 0),
    "wide: what the mean's sum rounds off": ("rest += (mean - (moved - back)) + (step - back)", "rest += 0.0", 0),
    "wide: digits of the first tile": ("mean = tl.where(start == 0, own, mean)", "mean = mean", 0),
}  # fmt: skip
SHAPES = (Shape("small", 9, 40), Shape("wide_backward", 3, 4200))
WIDE = (Shape("wide", 2, 17_001), SHAPES[-1])


def problems(shapes: tuple[Shape, ...]) -> list[Problem]:
    """Small problems of every kind, x with NaN between its rows; some far from zero, some tiny."""
    found = []
    kinds = ((torch.bfloat16, "both"), (torch.float32, "weight"), (torch.float32, "none"))
    for shape, added, (dtype, affine) in product(shapes, (True, False), kinds):
        offset = 300.0 if dtype == torch.float32 else 1.0
        problem = random(shape, dtype, seed=1, residual=added, affine=affine, offset=offset)
        x = apart(problem.inputs["x"])
        found.append(replace(problem, inputs={**problem.inputs, "x": x}))
    tiny = random(shapes[0], torch.float32, seed=2)
    found.append(replace(tiny, inputs={**tiny.inputs, "x": 1e-3 * tiny.inputs["x"]}))
    return [*found, random(Shape("many_tiles", 600, 130), torch.bfloat16, seed=3)]


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, kernels.__name__, problems(SHAPES + WIDE)) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    # the kernels that a mutant lives in are tried first
    shapes = WIDE if "wide" in mutant else SHAPES
    with planted(kernels, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, problems(shapes)) is not None, "nobody noticed"


def far_is_wrong(module: str) -> bool:
    """Whether rows ten thousand deviations from zero miss more than a few units of 2^-23."""
    launch = fused("far_" + module.replace(".", "_"), module)
    for N in (64, 20_000):
        x = 1e4 + rows(3, N)
        y = launch(x, None, None, 1e-5, None)
        if (y - F.layer_norm(x.double(), (N,))).abs().max() > 6e-6:
            return True
    return False


def test_rows_far_from_zero_are_right() -> None:
    assert not far_is_wrong(kernels.__name__)


@pytest.mark.parametrize("mutant", FAR)
def test_bug_far_from_zero_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(kernels, Mutant(*FAR[mutant]), tmp_path) as module:
        assert far_is_wrong(module), "nobody noticed"
