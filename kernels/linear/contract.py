"""linear's side of the contract: its cases, gold, baseline and magnitudes.

Its calls have no gradients: those are torch's own, of F.linear. Sums in fp32 differ from torch's by
their order, so in fp32 errors are compared with torch's, and elsewhere with one rounding. Weights
in int8 are held to the same, gold being the products with weight * scale in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.linear.api import OP, linear
from swathe.kernels.linear.eager import quantised
from swathe.kernels.linear.shapes import EDGES, Shape


def projected(*, implementation: str = "auto", **tensors: Any) -> Tensor | tuple[Tensor, ...]:
    """`linear` of tensors x, w0, b0, w1, ...; without gradients, and alone where there is one."""
    count = sum(name.startswith("w") for name in tensors)
    weights = [tensors[f"w{i}"] for i in range(count)]
    biases = [tensors.get(f"b{i}") for i in range(count)]
    scales = [tensors.get(f"s{i}") for i in range(count)]
    given: Any = scales if any(s is not None for s in scales) else None
    with torch.no_grad():
        found = linear(tensors["x"], weights, biases, scales=given, implementation=implementation)
    return found if count > 1 else found[0]


def random(
    shape: Shape, dtype: torch.dtype, *, seed: int, device: str = "cpu", int8: bool = False
) -> Problem:
    """Normal rows and weights, these scaled as a model's are; x a view of wider rows.

    With `int8` weights have rows of different sizes, one of zeros; the third is not in int8.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    inputs = {"x": normal(shape.M, shape.K + 3).to(dtype)[:, : shape.K]}
    for i, N in enumerate(shape.N):
        weight = normal(N, shape.K + 1) / max(shape.K, 1) ** 0.5
        if int8 and i != 2:
            weight *= normal(N, 1).exp()
            weight[2:3] = 0.0
            weight, inputs[f"s{i}"] = quantised(weight)
        inputs[f"w{i}"] = (weight if int8 and i != 2 else weight.to(dtype))[:, 1:]
        if shape.biased and i != 1:
            inputs[f"b{i}"] = normal(N).to(dtype)
    arriving = {f"y{i}": normal(shape.M, N).to(dtype) for i, N in enumerate(shape.N)}
    return Problem(inputs, arriving, label=shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every shape with full weights and in int8, with numbers of its own."""
    for index, shape in enumerate(EDGES):
        for group in ("", "int8"):
            given: Any = {"seed": 100 * seed + index, "device": device, "int8": group == "int8"}
            yield Case(group, random(shape, dtype, **given))


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
