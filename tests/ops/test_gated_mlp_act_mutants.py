"""Bugs planted in the Triton kernels of gated_mlp_act: the contract or the sanitizer sees each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import swathe.kernels.core.tl_math as tl_math
import swathe.kernels.gated_mlp_act._triton as kernels
from support.mutants import Mutant, apart, caught, planted
from swathe.kernels.core.contract import Problem
from swathe.kernels.gated_mlp_act.api import ACTS, LAYOUTS
from swathe.kernels.gated_mlp_act.contract import CONTRACT, random
from swathe.kernels.gated_mlp_act.op import fused
from swathe.kernels.gated_mlp_act.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

_LIVE = "live = (m < M)[:, None] & (n < N)[None, :]"
_BOTH = "live = (m < M)[:, None] & (both < 2 * N)[None, :]"
MUTANTS: dict[str, tuple[str, str, int]] = {
    "loads past the rows": (_LIVE, "live = (n < N)[None, :]", 0),
    "loads past the features": (_LIVE, "live = (m < M)[:, None] & (n >= 0)[None, :]", 0),
    "pairs past the features": (_BOTH, "live = (m < M)[:, None] & (both >= 0)[None, :]", 0),
    "gradients past the features": (_LIVE, "live = (m < M)[:, None] & (n >= 0)[None, :]", 1),
    "gate's stride for up": ("up_ptr + m[:, None] * up_stride", "up_ptr + m[:, None] * gate_stride", 0),
    "stride of gate ignored": ("gate_ptr + m[:, None] * gate_stride", "gate_ptr + m[:, None] * N", 0),
    "rows of the gradients dense": ("dense = m[:, None] * d_stride", "dense = m[:, None] * N", 0),
    "tiles of the first columns": ("return m, (p % tiles) * BLOCK_N", "return m, 0", 0),
    "tiles of the first rows": ("m = (p // tiles).to(tl.int64) * BLOCK_M", "m = (p // tiles).to(tl.int64) * 0", 0),
    "gate and up exchanged": ("gate, up = tl.split(", "up, gate = tl.split(", 0),
    "gradients exchanged": ("tl.join(dgate.to(dx_ptr.dtype.element_ty), dup.to(dx_ptr.dtype.element_ty))", "tl.join(dup.to(dx_ptr.dtype.element_ty), dgate.to(dx_ptr.dtype.element_ty))", 0),
    "pairs of the first tile": ("2 * first + tl.arange(0, 2 * BLOCK_N)", "first + tl.arange(0, 2 * BLOCK_N)", 0),
    "silu: slope without its curve": ('if ACT == "silu":\n        s, c = logistic(x)\n        return x * s, s + x * (s * c)', 'if ACT == "silu":\n        s, c = logistic(x)\n        return x * s, s', 0),
    "silu: alpha for all": ('if ACT == "silu":\n        s, c = logistic(x)', 'if ACT == "silu":\n        s, c = logistic(alpha * x)', 0),
    "gpt_oss: alpha forgotten": ("s, c = logistic(alpha * x)", "s, c = logistic(x)", 0),
    "gpt_oss: alpha left out of the slope": ("s + alpha * (x * (s * c))", "s + x * (s * c)", 0),
    "gpt_oss: up without its one": ("up = up + 1.0", "up = up", 0),
    "gpt_oss: gradient without its one": ("dy * (u + 1.0) * slope", "dy * u * slope", 0),
    "gpt_oss: gate not clamped": ("g = tl.where(gate > limit, limit, gate)", "g = gate", 0),
    "gpt_oss: gate clamped from below": ("g = tl.where(gate > limit, limit, gate)", "g = tl.where(gate > limit, limit, tl.where(gate < -limit, -limit, gate))", 0),
    "gpt_oss: up clamped on one side": ("tl.where(up < -limit, -limit, up)", "up", 0),
    "gpt_oss: gradient of what is clamped": ("tl.where(gate <= limit, dy * (u + 1.0) * slope, 0.0)", "dy * (u + 1.0) * slope", 0),
    "gpt_oss: gradient of a clamped up": ("tl.where((up >= -limit) & (up <= limit), dy * a, 0.0)", "dy * a", 0),
    "gelu_tanh: cube forgotten": ("(1.0 + _KAPPA * square))\n        return", "1.0)\n        return", 0),
    "gelu_tanh: slope of a plain logistic": ("(2.0 * _BETA + 6.0 * _BETA * _KAPPA * square)", "2.0 * _BETA", 0),
    "gelu_tanh: half forgotten": ("a = 0.5 * gate * (1.0 + tanh(", "a = gate * (1.0 + tanh(", 0),
    "gelu: density forgotten": ("return x * area, area + x * density", "return x * area, area", 0),
    "relu2: slope not doubled": ("return positive * positive, 2.0 * positive", "return positive * positive, positive", 0),
    "llama: act not rounded": ("    if LLAMA:\n        a = a.to(dtype)", "    if False:\n        a = a.to(dtype)", 0),
    "llama: act rounded for all": ("    if LLAMA:\n        a = a.to(dtype)", "    if True:\n        a = a.to(dtype)", 0),
    "llama: logistic not rounded": ("a = gate * s.to(dtype).to(tl.float32)", "a = gate * s", 0),
    "dup without act": ("return dgate, dy * a", "return dgate, dy", 0),
    "dgate without up": ("dgate = dy * up * slope", "dgate = dy * slope", 0),
    "up rounded down to gate's limit": ("limit = limit.to(gate.dtype).to(tl.float32)\n    dy,", "limit = 0.0 * limit\n    dy,", 0),
}  # fmt: skip
SHARED: dict[str, tuple[str, str, int]] = {
    "logistic overflows": ("small = tl.exp(-tl.abs(z))", "small = tl.exp(-z)", 0),
    "logistic mirrored": ("return tl.where(z >= 0, large, small)", "return tl.where(z >= 0, small, large)", 0),
    "tanh far from 0": ("far = 1.0 - 2.0 /", "far = 1.0 - 1.0 /", 0),
    "tanh's sign": ("tl.where(x < 0, -far, far)", "far", 0),
    "tanh near 0": ("near = near * square * x + x", "near = x", 0),
    "normal's scale": ("tl.erf(x * _SQRT_HALF)", "tl.erf(x)", 0),
    "density at 0": ("* _DENSITY_AT_0", "* 0.39", 0),
}  # fmt: skip
SMALL, TILES, ROWS = Shape("small", 9, 40), Shape("tiles", 3, 2100), Shape("rows", 40, 70)


def problems() -> list[Problem]:
    """Each activation in each layout and casting; rows that lie apart, several tiles."""
    found = []
    for turn, act in enumerate(ACTS):
        for packed in (None, *LAYOUTS):
            casting = "llama" if (turn + (packed is None)) % 2 else "fp32"
            found.append(
                random(SMALL, torch.bfloat16, seed=turn, act=act, packed=packed, casting=casting)
            )
        found.append(random(SMALL, torch.float32, seed=turn, act=act))
        found.append(random(SMALL, torch.bfloat16, seed=turn, act=act, casting="llama"))
    for shape in (TILES, ROWS):
        for packed in (None, *LAYOUTS):
            problem = random(shape, torch.bfloat16, seed=7, packed=packed)
            inputs = {**problem.inputs, "gate": apart(problem.inputs["gate"])}
            found.append(replace(problem, inputs=inputs))
    return found


PROBLEMS = problems()


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, kernels.__name__, PROBLEMS) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(kernels, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, PROBLEMS) is not None, "nobody noticed"


@pytest.mark.parametrize("mutant", SHARED)
def test_bug_in_the_mathematics_is_caught(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(tl_math, Mutant(*SHARED[mutant]), tmp_path) as module:
        broken = sys.modules[module]
        for name in ("logistic", "tanh", "normal"):
            monkeypatch.setattr(kernels, name, getattr(broken, name))
        assert caught(CONTRACT, fused, kernels.__name__, PROBLEMS) is not None, "nobody noticed"
