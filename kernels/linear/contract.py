"""linear's side of the contract: its cases, gold, baseline and magnitudes.

Its calls have no gradients: those are torch's own, of F.linear. Sums in fp32 differ from torch's by
their order, so in fp32 errors are compared with torch's, and elsewhere with one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.linear.api import OP, linear
from swathe.kernels.linear.shapes import EDGES, Shape


def projected(*, implementation: str = "auto", **tensors: Any) -> Tensor | tuple[Tensor, ...]:
    """`linear` of tensors x, w0, b0, w1, ...; without gradients, and alone where there is one."""
    count = sum(name.startswith("w") for name in tensors)
    weights = [tensors[f"w{i}"] for i in range(count)]
    biases = [tensors.get(f"b{i}") for i in range(count)]
    with torch.no_grad():
        found = linear(tensors["x"], weights, biases, implementation=implementation)
    return found if count > 1 else found[0]


def random(shape: Shape, dtype: torch.dtype, *, seed: int, device: str = "cpu") -> Problem:
    """Normal rows and weights, these scaled as a model's are; x a view of wider rows."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    inputs = {"x": normal(shape.M, shape.K + 3).to(dtype)[:, : shape.K]}
    for i, N in enumerate(shape.N):
        inputs[f"w{i}"] = (normal(N, shape.K + 1) / max(shape.K, 1) ** 0.5).to(dtype)[:, 1:]
        if shape.biased and i != 1:
            inputs[f"b{i}"] = normal(N).to(dtype)
    arriving = {f"y{i}": normal(shape.M, N).to(dtype) for i, N in enumerate(shape.N)}
    return Problem(inputs, arriving, label=shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every shape, with numbers of its own."""
    for index, shape in enumerate(EDGES):
        yield Case("", random(shape, dtype, seed=100 * seed + index, device=device))


def gold(problem: Problem) -> Outputs:
    """The products in fp64."""
    return baseline(problem.to(torch.float64))


def baseline(problem: Problem) -> Outputs:
    """torch's F.linear in the problem's own dtype."""
    return problem.run(partial(projected, implementation="eager"), backward=False)


def magnitudes(problem: Problem) -> Outputs:
    """The products of absolute values."""
    return baseline(problem.to(torch.float64).map(torch.abs))


CONTRACT = Contract(
    OP,
    projected,
    cases,
    gold,
    baseline,
    magnitudes,
    pooled=lambda name: name == "y0",
    bounds=lambda name: "rounded once",
    backward=False,
)
