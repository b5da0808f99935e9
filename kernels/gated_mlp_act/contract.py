"""gated_mlp_act's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.gated_mlp_act import eager
from swathe.kernels.gated_mlp_act.api import (
    ACTS,
    ALPHA,
    CASTINGS,
    LAYOUTS,
    LIMIT,
    OP,
    Casting,
    Packed,
    gated_mlp_act,
)
from swathe.kernels.gated_mlp_act.shapes import EDGES, FEW, Shape

FORMS: tuple[Packed | None, ...] = (None, *LAYOUTS)


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    act: str = "silu",
    casting: Casting = "fp32",
    packed: Packed | None = None,
) -> Problem:
    """Gates and ups of some units, rows of different scales; some beyond gpt_oss's limit.

    Drawn on the device itself: on a GPU, shapes may be large.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def rows(width: int) -> Tensor:
        spread = torch.rand(shape.M, 1, generator=generator, device=device).mul_(3).add_(0.5)
        found = torch.randn(shape.M, width, generator=generator, device=device)
        return found.mul_(spread).to(dtype)

    options: dict[str, Any] = {"act": act, "casting": casting}
    label = f"{shape.name} {packed or 'apart'}"
    arriving, gate, up = {"y": rows(shape.N)}, rows(shape.N), rows(shape.N)
    if casting == "llama" and act.startswith("gelu"):
        # further left torch's 1 + erf has few digits, and they are not the same on every device
        gate = gate.clamp(min=-3)
    if packed is None:
        return Problem({"gate": gate, "up": up}, arriving, options, label)
    return Problem({"gate": pack(gate, up, packed)}, arriving, {**options, "packed": packed}, label)


def pack(gate: Tensor, up: Tensor, packed: str) -> Tensor:
    """Both in one tensor: what eager.unpack undoes."""
    if packed == "halves":
        return torch.cat((gate, up), -1)
    return torch.stack((gate, up), -1).flatten(-2)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every activation and casting, the forms in turn; every edge shape in every form once."""
    for act in ACTS:
        for casting in CASTINGS:
            thorough = (act, casting) in (("silu", "fp32"), ("gpt_oss", "llama"))
            for index, shape in enumerate(EDGES if thorough else FEW):
                forms = FORMS if thorough else (None, LAYOUTS[(seed + index) % 2])
                for packed in forms:
                    problem = random(
                        shape,
                        dtype,
                        seed=1000 * seed + index,
                        device=device,
                        act=act,
                        casting=casting,
                        packed=packed,
                    )
                    yield Case(f"{act}-{casting}", problem)


def gold(problem: Problem) -> Outputs:
    """fp64; a limit that the inputs' dtype cannot hold would make gold another function."""
    wide = problem.to(torch.float64)
    if problem.options["act"] != "gelu_tanh":
        return _eager(wide, "fp32")

    def exact(gate: Tensor, up: Tensor | None = None, packed: str = "", **_: Any) -> Tensor:
        if up is None:
            gate, up = eager.unpack(gate, packed)
        # 1 + tanh has no digits left where gates are below -5, in fp64 too
        return gate * torch.sigmoid(2 * sqrt(2 / pi) * (gate + 0.044715 * gate**3)) * up

    return wide.run(exact)


def baseline(problem: Problem) -> Outputs:
    """HF's LlamaMLP, Phi3MLP and GptOssExperts, in the problem's own dtype."""
    return _eager(problem, "llama")


def _eager(problem: Problem, casting: Casting) -> Outputs:
    act, packed = problem.options["act"], problem.options.get("packed", "halves")

    def call(gate: Tensor, up: Tensor | None = None, **_: Any) -> Tensor:
        return eager.gated_mlp_act(gate, up, act, *_numbers(problem), casting, packed)

    return problem.run(call)


def _numbers(problem: Problem) -> tuple[float, float]:
    return problem.options.get("limit", LIMIT), problem.options.get("alpha", ALPHA)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas on absolute values; s and c, which an exponential makes, by their condition."""
    act, packed = problem.options["act"], problem.options.get("packed", "halves")
    wide = problem.to(torch.float64)
    gate = wide.inputs["gate"]
    x, up = (gate, wide.inputs["up"]) if "up" in wide.inputs else eager.unpack(gate, packed)
    dy = wide.arriving["y"].abs()
    up = up.abs() + (act == "gpt_oss")
    a, slope = _act_magnitudes(x, act, *_numbers(problem))
    if problem.options["casting"] == "llama":
        # torch's 1 + tanh and 1 + erf round against 1; fp16 rounds small act(x) to 2^-24
        a = a + x.abs() * act.startswith("gelu") + 1 / 32
    y, dgate, dup = a * up, dy * up * slope, dy * a
    if "up" in wide.inputs:
        found = {"y": y, "dgate": dgate, "dup": dup}
    else:
        found = {"y": y, "dgate": pack(dgate, dup, packed)}
    if act == "gpt_oss" and roundings("y", problem) > 1:
        del found["y"]  # what rounding alpha * gate does to the sigmoid grows with the gate
    return found


def _act_magnitudes(x: Tensor, act: str, limit: float, alpha: float) -> tuple[Tensor, Tensor]:
    size = x.abs()
    if act in ("relu", "relu2"):
        positive = x.clamp(min=0)
        return (positive, (x > 0).double()) if act == "relu" else (positive**2, 2 * positive)
    if act == "gelu":
        density = torch.exp(-0.5 * x * x) / sqrt(2 * pi)
        area = 0.5 * (1 + torch.erf(x / sqrt(2)).abs())
        return size * area, area + size * density * (1 + 0.5 * x * x)
    z, dz = x, torch.ones_like(x)
    if act == "gpt_oss":
        z, dz = alpha * x.clamp(max=limit), dz * alpha
    if act == "gelu_tanh":
        beta = 2 * sqrt(2 / pi)
        z, dz = beta * (x + 0.044715 * x**3), beta * (1 + 3 * 0.044715 * x * x)
    s, c = torch.sigmoid(z), torch.sigmoid(-z)
    return size * s * (1 + z.abs()), (s + size * s * c * dz) * (1 + z.abs())


def roundings(name: str, problem: Problem) -> int:
    """y of casting "llama" has HF's; everything else is rounded once."""
    if name != "y" or problem.options["casting"] != "llama":
        return 1
    return 5 if problem.options["act"] == "gpt_oss" else 2


CONTRACT = Contract(
    OP,
    gated_mlp_act,
    cases,
    gold,
    baseline,
    magnitudes,
    roundings=roundings,
)
