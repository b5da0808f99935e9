"""Bugs planted in the row kernels of cross-entropy: contract and sanitizer catch every one."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from support.interpreter import SanitizerError, sanitized
from support.mutants import Mutant, apart, caught, planted
from swathe.kernels.core import logits, tl_math
from swathe.kernels.core.contract import Problem
from swathe.kernels.cross_entropy.contract import CONTRACT, GROUPS, random
from swathe.kernels.cross_entropy.op import fused
from swathe.kernels.cross_entropy.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

MUTANTS: dict[str, tuple[str, str, int]] = {
    "scale after the cap": ("z = x.to(tl.float32) * scale\n    if SOFTCAP:\n        t = tanh(z / softcap)\n        return softcap * t, t", "z = x.to(tl.float32)\n    if SOFTCAP:\n        t = tanh(z / softcap)\n        return softcap * t * scale, t", 0),
    "cap forgotten": ("return softcap * t, t", "return z, t", 0),
    "scale forgotten": ("z = x.to(tl.float32) * scale", "z = x.to(tl.float32)", 0),
    "row stride ignored": ("row_ptr = x_ptr + m * x_stride", "row_ptr = x_ptr + m * V", 0),
    "row stride ignored in the gradient": ("x_ptr + m * x_stride + v, live", "x_ptr + m * V + v, live", 0),
    "ignored rows count": ("loss = tl.where(ignored, 0.0, tl.where(known, loss, float(\"nan\")))", "loss = tl.where(known | ignored, loss, float(\"nan\"))", 0),
    "ignored rows have gradients": ("live = v < tl.where(label == ignore_index, 0, V)", "live = v < V", 0),
    "last tile dropped": ("for start in range(0, end, BLOCK_V):", "for start in range(0, end - BLOCK_V, BLOCK_V):", 0),
    "dead lanes of the last tile count": ("z = tl.where(live, z, float(\"-inf\"))", "z = z * 1.0", 0),
    "dead lanes read": ("tl.load(row_ptr + v, live, other=0.0)", "tl.load(row_ptr + v, v < BLOCK_V, other=0.0)", 0),
    "sum not shrunk at a new peak": ("sums * step + 1.0, sums + step", "sums + 1.0, sums + step", 0),
    "new term at a new peak is not 1": ("sums * step + 1.0, sums + step", "sums * step + step, sums + step", 0),
    "peak of the first tile": ("peak = tl.maximum(peak, z)", "peak = tl.where(start == 0, z, peak)", 0),
    "lanes merged without their peaks": ("sums * tl.exp(peak - top)", "sums", 0),
    "label of the next row": ("label = tl.load(label_ptr + m).to(tl.int64)", "label = tl.load(label_ptr + (m + 1) % tl.num_programs(0)).to(tl.int64)", 0),
    "label without the cap": ("target, _ = _scores(at_label, scale, softcap, SOFTCAP)", "target = at_label.to(tl.float32) * scale", 0),
    "smoothing: the label keeps all": ("loss = (1.0 - smoothing) * (log_sum", "loss = (log_sum", 0),
    "smoothing: mean over the tiles": ("tl.sum(total, 0) / V - top", "tl.sum(total, 0) / (tl.cdiv(V, BLOCK_V) * BLOCK_V) - top", 0),
    "smoothing: only the last tile": ("total += tl.where(live, z, 0.0)", "total = tl.where(live, z, 0.0)", 0),
    "z_loss of the peak": ("lse = top + log_sum", "lse = top", 0),
    "z_loss not squared": ("z_loss * lse * lse", "z_loss * lse", 0),
    "dx: peak left out": ("tl.exp((z - peak) - log_sum)", "tl.exp(z - log_sum)", 0),
    "dx: z_loss forgotten": ("* (1.0 + 2.0 * z_loss * (peak + log_sum))", "", 0),
    "dx: smoothing not spread": (" - smoothing / V\n", "\n", 0),
    "dx: label takes all": ("dz - (1.0 - smoothing)", "dz - 1.0", 0),
    "dx: slope of the cap forgotten": ("dz *= 1.0 - t * t", "dz *= 1.0", 0),
    "dx: slope of z, not of tanh": ("dz *= 1.0 - t * t", "dz *= 1.0 - z * z", 0),
    "dx: scale forgotten": ("arriving * scale, float(\"nan\")", "arriving, float(\"nan\")", 0),
    "dx: arriving of the first row for all": ("arriving_ptr + m * arriving_stride", "arriving_ptr", 0),
    "dx: arriving in low precision": ("dx = tl.where(live, dz * arriving, 0.0)", "dx = tl.where(live, dz.to(x_ptr.dtype.element_ty).to(tl.float32) * arriving, 0.0)", 0),
    "dx: tiles confused with rows": ("tile = tl.program_id(0) % tiles", "tile = tl.program_id(0) // tiles % tiles", 0),
    "dx: stored past the row": ("tl.store(dx_ptr + m * V + v, rounded, v < V)", "tl.store(dx_ptr + m * V + v, rounded)", 0),
    "dx: ignored rows not written": ("tl.store(dx_ptr + m * V + v, rounded, v < V)", "tl.store(dx_ptr + m * V + v, rounded, live)", 0),
    "wrong number of tiles": ("(M * cdiv(V, columns), 1, 1)", "(M * max(1, V // columns), 1, 1)", 0),
    "one arriving gradient for all": ("arriving, stride = one_stride(arriving)", "arriving, stride = one_stride(arriving)[0], 0", 0),
}  # fmt: skip
TANH: dict[str, tuple[str, str, int]] = {
    "series too far": ("tl.abs(x) < 0.625", "tl.abs(x) < 1.5", 0),
    "no series": ("tl.abs(x) < 0.625", "tl.abs(x) < 0.0", 0),
    "sign lost": ("tl.where(x < 0, -far, far)", "far", 0),
}  # fmt: skip
SHAPES = (Shape("small", 5, 40), Shape("past_narrow", 3, 1030), Shape("past_wide", 3, 4100))


def problems() -> list[Problem]:
    """Small problems of every kind, logits with NaN between their rows."""
    found = []
    for shape, group, dtype in product(SHAPES, GROUPS, (torch.bfloat16, torch.float32)):
        for reduction in ("mean", "none"):
            options = {**GROUPS[group], "reduction": reduction}
            problem = random(shape, dtype, seed=1, ignored=0.4, **options)
            labels = problem.options["labels"].clone()
            labels[0], labels[1] = shape.V - 1, -100
            x = apart(problem.inputs["logits"])
            # what is in an ignored row is nobody's business
            x[1] = 1e4
            found.append(replace(problem.given(labels=labels), inputs={"logits": x}))
    # small logits under a wide cap: what tanh loses near 0 is multiplied by the cap
    tiny = random(SHAPES[0], torch.float32, seed=2, spread=0.05, softcap=500.0, reduction="none")
    return [*found, tiny]


def rest_is_wrong(module: str) -> str | None:
    """What `rest` misses: the other half of a rounded gradient, which the op itself never asks for."""
    kernels = sys.modules[module]
    numbers = (-100, 0.1, 5.0, 0.5, 1e-3)
    for V in (40, 1030, 4100):
        x = torch.randn(4, V, generator=torch.Generator().manual_seed(V)) * 3
        labels = torch.tensor([V - 1, -100, 0, V + 3])
        _, *saved = logits.forward(x, labels, *numbers)
        rest, one = torch.full((4,), 9.0), torch.tensor(0.7)
        exact, rounded = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
        logits.write_gradients(one, x, labels, tuple(saved), numbers, exact)
        with sanitized(order="random", seed=1):
            try:
                kernels.write_gradients(one, x, labels, tuple(saved), numbers, rounded, rest)
            except SanitizerError as error:
                return str(error)
        at = ([0, 2], [V - 1, 0])
        expected = torch.stack([*(exact[at] - rounded[at].float()), *torch.zeros(2)])
        if not torch.equal(rest[[0, 2, 1, 3]], expected):
            return f"rest {rest.tolist()}, expected {expected.tolist()}"
    return None


REST_MUTANTS: dict[str, tuple[str, str, int]] = {
    "the wrong tile speaks": ("label // BLOCK_V, 0)", "0, 0)", 0),
    "every tile speaks": ("if tile == speaker:", "if tile >= 0:", 0),
    "rows without a label are left out": ("label // BLOCK_V, 0)", "label // BLOCK_V, -1)", 0),
    "the sum of all that was lost": ("tl.where(v == label, dx - rounded.to(tl.float32), 0.0)", "dx - rounded.to(tl.float32)", 0),
    "what was kept, not what was lost": ("dx - rounded.to(tl.float32), 0.0)", "rounded.to(tl.float32), 0.0)", 0),
}  # fmt: skip


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, logits.__name__, problems()) is None
    assert rest_is_wrong(logits.__name__) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(logits, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, problems()) is not None, "nobody noticed"


@pytest.mark.parametrize("mutant", TANH)
def test_planted_bug_in_tanh_is_caught(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(tl_math, Mutant(*TANH[mutant]), tmp_path) as module:
        monkeypatch.setattr(logits, "tanh", sys.modules[module].tanh)
        assert caught(CONTRACT, fused, logits.__name__, problems()) is not None, "nobody noticed"


@pytest.mark.parametrize("mutant", REST_MUTANTS)
def test_planted_bug_in_the_rest_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(logits, Mutant(*REST_MUTANTS[mutant]), tmp_path) as module:
        assert rest_is_wrong(module) is not None, "nobody noticed"
