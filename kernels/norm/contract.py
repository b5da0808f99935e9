"""RMSNorm's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import CASTINGS, OP, Casting, rms_norm
from swathe.kernels.norm.shapes import EDGES, Shape

EPS = 1e-6


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    residual: bool = False,
    casting: Casting = "fp32",
    weight_dtype: torch.dtype | None = None,
    amplitude: float = 1.0,
) -> Problem:
    """Rows of different scales, weights around one (around zero for "gemma"), any seed.

    Drawn on the device itself: on a GPU, shapes may be large.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def rows(scale: float = 1.0) -> Tensor:
        spread = torch.randn(shape.M, 1, generator=generator, device=device).exp_() * scale
        return _randn(shape.M, shape.N, generator=generator).mul_(spread).to(dtype)

    offset = 1.0 if casting == "gemma" else 0.0
    weight = 1.0 - offset + 0.2 * _randn(shape.N, generator=generator)
    weight = weight.to(weight_dtype or dtype)
    out = torch.promote_types(dtype, weight.dtype) if casting == "llama" else dtype
    inputs, arriving = {"x": rows(amplitude), "weight": weight}, {"y": rows().to(out)}
    if residual:
        inputs["residual"], arriving["h"] = rows(), rows()
    options = {"eps": EPS, "offset": offset, "casting": casting}
    return Problem(inputs, arriving, options, shape.name)


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape in every casting, with and without a residual in turn."""
    for casting in CASTINGS:
        for index, shape in enumerate(EDGES):
            options: dict[str, Any] = {"residual": index % 2 == 1, "casting": casting}
            yield Case(
                casting, random(shape, dtype, seed=1000 * seed + index, device=device, **options)
            )


def _on_h(problem: Problem, casting: Casting, dtype: torch.dtype | None) -> Outputs:
    """The eager formula on h = x + residual as the inputs' dtype rounds it, in `dtype`."""
    x, residual = problem.inputs["x"].detach(), problem.inputs.get("residual")
    h = x if residual is None else x + residual
    inputs = {"h": h, "weight": problem.inputs["weight"]}
    alone = Problem(inputs, {"y": problem.arriving["y"]})
    alone = alone if dtype is None else alone.to(dtype)
    offset = problem.options["offset"]
    found = alone.run(lambda h, weight: eager.rms_norm(h, weight, EPS, offset, casting, None))
    outputs = {"y": found["y"], "dx": found["dh"], "dweight": found["dweight"]}
    if residual is not None:
        outputs["dx"] = outputs["dx"] + problem.arriving["h"].to(outputs["dx"].dtype)
        outputs |= {"h": h if dtype is None else h.to(dtype), "dresidual": outputs["dx"]}
    return outputs


def gold(problem: Problem) -> Outputs:
    """fp64 from h on: what x + residual rounds to is part of the op's meaning."""
    return _on_h(problem, "fp32", torch.float64)


def baseline(problem: Problem) -> Outputs:
    """HF's LlamaRMSNorm, or GemmaRMSNorm for "gemma"."""
    return _on_h(problem, "gemma" if problem.options["casting"] == "gemma" else "llama", None)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas of y, dx and dweight on absolute values."""
    x, residual = problem.inputs["x"], problem.inputs.get("residual")
    h = (x if residual is None else x + residual).double()
    weight, dy = problem.inputs["weight"].double(), problem.arriving["y"].double().abs()
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    xhat, scale = (h * rstd).abs(), abs(problem.options["offset"]) + weight.abs()
    g = dy * scale
    dx = rstd * (g + xhat * (g * xhat).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + problem.arriving["h"].double().abs()
    return {"y": xhat * scale, "dx": dx, "dweight": (dy * xhat).flatten(0, -2).sum(0)}


def roundings(name: str, problem: Problem) -> int:
    """y of casting "llama" has HF's two; everything else is rounded once."""
    return 2 if name == "y" and problem.options["casting"] == "llama" else 1


def exactly(problem: Problem, ours: Outputs, eager: Outputs) -> list[str]:
    """h is x + residual bit for bit, and both carry one gradient."""
    if "h" not in ours:
        return []
    wrong = []
    if not torch.equal(ours["h"], problem.inputs["x"] + problem.inputs["residual"]):
        wrong.append(f"h {problem.label}: is not x + residual, bit for bit")
    if not torch.equal(ours["dresidual"].to(ours["dx"].dtype), ours["dx"]):
        wrong.append(f"dresidual {problem.label}: differs from dx")
    return wrong


def tuning(N: int, dtype: torch.dtype, device: str) -> Problem:
    """128 MiB of rows in bf16, with a residual."""
    return random(Shape("tuning", 2**26 // N, N), dtype, seed=0, device=device, residual=True)


CONTRACT = Contract(
    OP,
    rms_norm,
    cases,
    gold,
    baseline,
    magnitudes,
    roundings=roundings,
    exactly=exactly,
    tuning=tuning,
)
