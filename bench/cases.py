"""What is measured: cells (op, shape, dtype, variant), and the gate before any timing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.subject import Subject, Variant, size, subject
from swathe.kernels.core.contract import Outputs, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# largest ||out - gold|| / ||gold|| of a contender that may be timed: four roundings, and sums of
# 16k rows in fp32
GATE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Cell:
    """One cell of the results: every contender is timed on it, side by side."""

    op: str
    shape: str
    size: str
    dtype: str
    variant: str

    @classmethod
    def of(cls, op: str, shape: Any, dtype: str, variant: Variant) -> Cell:
        """The cell of a named shape."""
        return cls(op, shape.name, size(shape), dtype, variant.name)

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.size.replace(' ', '')} {self.dtype} {self.variant}"

    @property
    def subject(self) -> Subject:
        """The op that is measured."""
        return subject(self.op)

    @property
    def kind(self) -> Variant:
        """The variant itself."""
        return self.subject.variant(self.variant)

    def facts(self) -> dict[str, Any]:
        """The columns that every row of this cell shares."""
        return asdict(self)


def draw(cell: Cell, device: str, seed: int) -> Problem:
    """Random inputs of a cell, made on the device itself."""
    shape, dtype = cell.subject.shape(cell.shape), DTYPES[cell.dtype]
    return cell.subject.draw(shape, dtype, cell.kind.form, device, seed)


def gold(cell: Cell, problem: Problem) -> Outputs:
    """fp64 results on the rounded inputs: outputs, gradients or both, as a call gives them."""
    found, kind = cell.subject.contract.gold(problem), cell.kind
    if kind.backward and not kind.alone:
        return found
    return {name: t for name, t in found.items() if (name in problem.arriving) != kind.alone}


def gate(outputs: Outputs, truth: Outputs, dtype: torch.dtype) -> str | None:
    """Why a contender's outputs are wrong, or None: nothing is timed on a red gate.

    `dtype` is that of the inputs: an fp32 loss of bf16 logits is as good as bf16 lets it be.
    """
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
        allowed = max(GATE[found.dtype], GATE[dtype])
        if not error <= allowed:
            return f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
    return None
