"""LayerNorm's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.layer_norm import eager
from swathe.kernels.layer_norm.api import OP, layer_norm
from swathe.kernels.layer_norm.shapes import EDGES, Shape

EPS = 1e-5
AFFINE = ("both", "weight", "none")


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    residual: bool = False,
    affine: str = "both",
    weight_dtype: torch.dtype | None = None,
    offset: float = 1.0,
) -> Problem:
    """Rows of different scales whose means are about `offset` of their own deviations."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def rows(mean: float) -> Tensor:
        spread = randn(shape.M, 1).exp_()
        return (randn(shape.M, shape.N) + mean * randn(shape.M, 1)).mul_(spread).to(dtype)

    inputs, arriving = {"x": rows(offset)}, {"y": rows(0.0)}
    if affine != "none":
        inputs["weight"] = (1 + 0.2 * randn(shape.N)).to(weight_dtype or dtype)
    if affine == "both":
        inputs["bias"] = randn(shape.N).to(weight_dtype or dtype)
    if residual:
        inputs["residual"], arriving["h"] = rows(0.0), rows(0.0)
    return Problem(inputs, arriving, {"eps": EPS}, shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape plain and, in a group of its own, every other one with rows far from zero.

    There the mean is a hundred deviations: a variance formed as E[x^2] - E[x]^2 is lost.
    """
    for group, offset, shapes in (("", 1.0, EDGES), ("far", 100.0, EDGES[3::2])):
        for index, shape in enumerate(shapes):
            options: dict[str, Any] = {
                "residual": index % 2 == 1,
                "affine": AFFINE[index % 3 and index % 4 - 1] if index % 4 > 1 else "both",
                "offset": offset,
            }
            yield Case(
                group, random(shape, dtype, seed=1000 * seed + index, device=device, **options)
            )


def hf_eager(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers executes: nn.LayerNorm, after an addition where there is a residual."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, h)


def _on_h(problem: Problem, dtype: torch.dtype | None) -> Outputs:
    """The formula on h = x + residual as the inputs' dtype rounds it, in `dtype`."""
    x, residual = problem.inputs["x"].detach(), problem.inputs.get("residual")
    h = x if residual is None else x + residual
    weights = {k: problem.inputs[k] for k in ("weight", "bias") if k in problem.inputs}
    alone = Problem({"h": h, **weights}, {"y": problem.arriving["y"]})
    alone = alone if dtype is None else alone.to(dtype)

    def norm(h: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Any:
        if dtype is None:
            return hf_eager(h, weight, bias, eps=EPS)
        return eager.layer_norm(h, weight, bias, EPS, None)

    found = alone.run(norm)
    found["dx"] = found.pop("dh")
    if residual is not None:
        found["dx"] = found["dx"] + problem.arriving["h"].to(found["dx"].dtype)
        found |= {"h": h if dtype is None else h.to(dtype), "dresidual": found["dx"]}
    return found


def gold(problem: Problem) -> Outputs:
    """fp64 from h on: what x + residual rounds to is part of the op's meaning."""
    return _on_h(problem, torch.float64)


def baseline(problem: Problem) -> Outputs:
    """torch's layer_norm in the inputs' dtype, which is what HF calls."""
    return _on_h(problem, None)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas of y and the gradients on absolute values; |h| stands for what is centred."""
    x, residual = problem.inputs["x"], problem.inputs.get("residual")
    h = (x if residual is None else x + residual).double()
    dy = problem.arriving["y"].double().abs()
    weight = problem.inputs.get("weight")
    scale = torch.ones_like(h[:1]) if weight is None else weight.double().abs()
    mean = h.mean(-1, keepdim=True)
    rstd = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + EPS)
    xhat = (h.abs() + h.abs().mean(-1, keepdim=True)) * rstd
    g = dy * scale
    dx = rstd * (g + g.mean(-1, keepdim=True) + xhat * (g * xhat).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + problem.arriving["h"].double().abs()
    bias = problem.inputs.get("bias")
    y = xhat * scale + (0 if bias is None else bias.double().abs())
    return {"y": y, "dx": dx, "dweight": (dy * xhat).sum(0), "dbias": dy.sum(0)}


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
    layer_norm,
    cases,
    gold,
    baseline,
    magnitudes,
    exactly=exactly,
    tuning=tuning,
)
