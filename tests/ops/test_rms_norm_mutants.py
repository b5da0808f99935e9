"""Bugs planted in the Triton kernels of RMSNorm: the contract and the sanitizer catch every one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import swathe.kernels.norm._triton as norm
from support.mutants import Mutant, apart, caught, planted
from swathe.kernels.core.contract import Problem
from swathe.kernels.norm.api import Casting
from swathe.kernels.norm.contract import CONTRACT, random
from swathe.kernels.norm.op import fused
from swathe.kernels.norm.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

MUTANTS: dict[str, tuple[str, str, int]] = {
    "load past the rows": ("live = (m < M)[:, None] & (n < N)[None, :]", "live = (n < N)[None, :]", 0),
    "load past the features": (
        "live = (m < M)[:, None] & (n < N)[None, :]",
        "live = (m < M)[:, None] & (n < BLOCK_N)[None, :]",
        0,
    ),
    "no zero in dead lanes": ("x_stride + n[None, :], live, other=0.0)", "x_stride + n[None, :], live)", 0),
    "residual not added": ("(h.to(tl.float32) + r.to(tl.float32))", "(h.to(tl.float32))", 0),
    "h not rounded before its square": (
        ".to(h_ptr.dtype.element_ty)\n        tl.store(h_ptr + dense, h, live)",
        "\n        tl.store(h_ptr + dense, h.to(h_ptr.dtype.element_ty), live)",
        0,
    ),
    "mean over the block, not the row": ("tl.sum(xhat * xhat, 1) / N", "tl.sum(xhat * xhat, 1) / BLOCK_N", 0),
    "eps forgotten": ("tl.sum(xhat * xhat, 1) / N + eps", "tl.sum(xhat * xhat, 1) / N", 0),
    "eps outside the root": (
        "1.0 / tl.sqrt_rn(tl.sum(xhat * xhat, 1) / N + eps)",
        "1.0 / (tl.sqrt_rn(tl.sum(xhat * xhat, 1) / N) + eps)",
        0,
    ),
    "squares in low precision": (
        "tl.sum(xhat * xhat, 1)",
        "tl.sum((xhat * xhat).to(x_ptr.dtype.element_ty).to(tl.float32), 1)",
        0,
    ),
    "offset forgotten": ("y = xhat * (offset + w)[None, :]", "y = xhat * w[None, :]", 0),
    "offset forgotten in the gradient": ("scale = offset + tl.load", "scale = tl.load", 0),
    "llama's rounding left out": ("if LLAMA:", "if False:", 0),
    "llama's rounding for all": ("if LLAMA:", "if True:", 0),
    "weight rounded into xhat": ("y = xhat * (offset + w)[None, :]", "y = xhat.to(h.dtype).to(tl.float32) * (offset + w)[None, :]", 0),
    "rstd of the first row for all": ("tl.store(rstd_ptr + m, rstd, m < M)", "tl.store(rstd_ptr + m, rstd, m < 1)", 0),
    "rows stored past the end": ("tl.store(rstd_ptr + m, rstd, m < M)", "tl.store(rstd_ptr + m, rstd)", 0),
    "row stride ignored": ("x_ptr + m[:, None] * x_stride", "x_ptr + m[:, None] * N", 0),
    "last tile of a wide row dropped": ("for start in range(0, N, BLOCK_N):", "for start in range(0, N - BLOCK_N, BLOCK_N):", 0),
    "wide row: second pass shifted": ("for start in range(0, N, BLOCK_N):", "for start in range(BLOCK_N, N, BLOCK_N):", 1),
    "wide row: statistics of x, not h": ("squares += h.to(tl.float32) * h.to(tl.float32)", "squares += tl.load(x_ptr + m * x_stride + n, live, other=0.0).to(tl.float32) * h.to(tl.float32)", 0),
    "dx: mean term dropped": ("dx = rstd * (g - xhat * (tl.sum(g * xhat, 1) / N)[:, None])", "dx = rstd * g", 0),
    "dx: mean term not divided": ("(tl.sum(g * xhat, 1) / N)", "tl.sum(g * xhat, 1)", 0),
    "dx: weight left out of the mean": ("(tl.sum(g * xhat, 1) / N)", "(tl.sum(dy * xhat, 1) / N)", 0),
    "dx: dh not added": ("dx += tl.load(dh_at, live, other=0.0).to(tl.float32)", "dx += 0.0", 0),
    "dx: rounded before dh is added": (
        "dx += tl.load(dh_at, live, other=0.0).to(tl.float32)",
        "dx = dx.to(h_ptr.dtype.element_ty).to(tl.float32) + tl.load(dh_at, live, other=0.0).to(tl.float32)",
        0,
    ),
    "dw: weighted gradient": ("dw += dy * xhat\n\n    tl.store(partial_ptr + tl.cast(p, tl.int64) * N + n, tl.sum(dw, 0)", "dw += g * xhat\n\n    tl.store(partial_ptr + tl.cast(p, tl.int64) * N + n, tl.sum(dw, 0)", 0),
    "dw: only the last tile": ("        dw += dy * xhat\n", "        dw = dy * xhat\n", 0),
    "dw: low precision sum": ("        dw += dy * xhat\n", "        dw = (dw + dy * xhat).to(dy_ptr.dtype.element_ty).to(tl.float32)\n", 0),
    "dw: programs share a row of partials": ("partial_ptr + tl.cast(p, tl.int64) * N + n, tl.sum(dw, 0)", "partial_ptr + n, tl.sum(dw, 0)", 0),
    "dw: a program skips tiles": ("tl.cdiv(M, BLOCK_M), tl.num_programs(0)", "tl.cdiv(M, BLOCK_M), tl.num_programs(0) + 1", 0),
    "wide dx: rstd left out of the dot": ("tl.sum(products, 0) * tl.load(rstd_ptr + m) / N", "tl.sum(products, 0) / N", 0),
    "wide dx: weight left out of the dot": ("products += dy * (offset + w) * h", "products += dy * h", 0),
    "wide dx: columns of the first tile": ("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)\n    p =", "n = tl.arange(0, BLOCK_N)\n    p =", 0),
    "wide dw: rows skipped": ("for row in range(p, M, tl.num_programs(1)):", "for row in range(p + 1, M, tl.num_programs(1)):", 0),
}  # fmt: skip
SHAPES = (
    Shape("small", 9, 40),
    Shape("many_tiles", 600, 130),
    Shape("odd", 5, 1025),
    Shape("wide_backward", 3, 8300),
    Shape("wide", 2, 33_001),
)


KINDS: tuple[tuple[torch.dtype, Casting], ...] = (
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "llama"),
    (torch.float32, "gemma"),
)


def problems(shapes: tuple[Shape, ...] = SHAPES) -> list[Problem]:
    """Small problems of every kind, x with NaN between its rows."""
    found = []
    for shape, added, (dtype, casting) in product(shapes, (True, False), KINDS):
        problem = random(shape, dtype, seed=1, residual=added, casting=casting)
        x = apart(problem.inputs["x"])
        found.append(replace(problem, inputs={**problem.inputs, "x": x}))
    return found


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, norm.__name__, problems()) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    # the kernels that a mutant lives in are tried first
    shapes = SHAPES[::-1] if "wide" in mutant else SHAPES
    with planted(norm, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, problems(shapes)) is not None, "nobody noticed"
