"""What is measured: cells (shape, dtype, variant), their random inputs, traffic and fp64 truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.norm.contract import Outputs, Problem
from swathe.kernels.norm.shapes import EDGES, GPU, MODELS, Shape

OP = "rms_norm"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# the CPU cells are rows (1, 16, 2048) by columns (576, 2048, 4096): MODELS and one more
CPU_SHAPES = tuple(
    sorted((*MODELS, Shape("smollm2_135m_batch", 16, 576)), key=lambda s: (s.N, s.M))
)
# training shapes first: what a run that is cut short should have seen
GPU_SHAPES = (*sorted(GPU, key=lambda s: "train" not in s.name), *MODELS)
TINY_SHAPES = (Shape("tiny", 3, 64), Shape("tiny_odd", 5, 37))
NAMED = {s.name: s for s in (*EDGES, *CPU_SHAPES, *GPU_SHAPES, *TINY_SHAPES)}

# largest ||out - gold|| / ||gold|| of a contender that may be timed: four roundings, and sums of
# 16k rows in fp32
GATE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Variant(NamedTuple):
    """What one timed call does."""

    name: str
    backward: bool
    residual: bool


VARIANTS = (
    Variant("forward", False, False),
    Variant("forward+backward", True, False),
    Variant("add forward", False, True),
    Variant("add forward+backward", True, True),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the results: every contender is timed on it, side by side."""

    shape: str
    M: int
    N: int
    dtype: str
    variant: str

    @classmethod
    def of(cls, shape: Shape, dtype: str, variant: Variant) -> Cell:
        """The cell of a named shape."""
        return cls(shape.name, shape.M, shape.N, dtype, variant.name)

    def __str__(self) -> str:
        return f"{self.shape} {self.M}x{self.N} {self.dtype} {self.variant}"

    @property
    def kind(self) -> Variant:
        """The variant itself."""
        return next(v for v in VARIANTS if v.name == self.variant)

    def facts(self) -> dict[str, Any]:
        """The columns that every row of this cell shares."""
        return {"op": OP, **asdict(self)}

    def traffic(self) -> int:
        """Fewest bytes the op can move: each input read once, each output written once.

        Forward 2*M*N (4*M*N with a residual), backward 3*M*N (4*M*N: dh comes in as well), plus
        the weight once each way and its gradient.
        """
        size = torch.empty(0, dtype=DTYPES[self.dtype]).element_size()
        forward, backward = (4, 4) if self.kind.residual else (2, 3)
        rows = forward + backward * self.kind.backward
        return size * (rows * self.M * self.N + (1 + 2 * self.kind.backward) * self.N)


def draw(cell: Cell, device: str, seed: int, casting: Any = "llama") -> Problem:
    """Random inputs made on the device itself: rows of different scales, weights around one."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[cell.dtype]

    def rows() -> Tensor:
        spread = torch.randn(cell.M, 1, generator=generator, device=device).exp_()
        return (
            torch.randn(cell.M, cell.N, generator=generator, device=device).mul_(spread).to(dtype)
        )

    offset = 1.0 if casting == "gemma" else 0.0
    weight = 1.0 - offset + 0.2 * torch.randn(cell.N, generator=generator, device=device)
    residual, dh = (rows(), rows()) if cell.kind.residual else (None, None)
    return Problem(rows(), weight.to(dtype), rows(), residual, dh, offset, casting)


def gold(problem: Problem, backward: bool) -> Outputs:
    """fp64 results on the rounded inputs, and h where there is a residual."""
    outputs = problem.reference(torch.float64)
    if problem.residual is not None:
        outputs["h"] = (problem.x + problem.residual).double()
        outputs["dr"] = outputs["dx"]
    return outputs if backward else {k: v for k, v in outputs.items() if k in ("y", "h")}


def gate(outputs: Outputs, truth: Outputs) -> str | None:
    """Why a contender's outputs are wrong, or None: nothing is timed on a red gate."""
    if outputs.keys() != truth.keys():
        return f"returned {sorted(outputs)}, expected {sorted(truth)}"
    for name, expected in truth.items():
        found = outputs[name]
        if found.shape != expected.shape:
            return f"{name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        if found.dtype not in GATE:
            return f"{name} has dtype {found.dtype}"
        scale = max(expected.norm().item(), 1e-300)
        error = (found.double() - expected).norm().item() / scale
        if not error <= GATE[found.dtype]:
            return f"{name}: relative error {error:.3g}, allowed {GATE[found.dtype]:.3g}"
    return None
