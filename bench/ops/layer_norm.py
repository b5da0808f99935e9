"""LayerNorm under measurement: rows of features, with and without the residual's addition."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.contenders import library
from bench.huge import ends_differ
from bench.subject import Function, Peer, Subject, bytes_of, grid, on_grid
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.layer_norm.api import resolve_layer_norm
from swathe.kernels.layer_norm.contract import CONTRACT, hf_eager, random
from swathe.kernels.layer_norm.shapes import GPU, MODELS, Shape

PROBES = {
    "rows": Shape("probe_rows", 3, 1024),
    "wide backward": Shape("probe_wide_backward", 3, 10_000),
    "wide": Shape("probe_wide", 3, 33_001),
}

GIGABYTE = Shape("gigabyte", 131_072, 4096)  # in bf16


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """Weight and bias; `form` "add" brings a residual."""
    return random(shape, dtype, seed=seed, device=device, residual=form == "add")


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's norm, after an addition where there is a residual."""

    def norm(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Any:
        if residual is None:
            return module.liger_layer_norm(x, weight, bias, eps)
        h = x + residual
        return module.liger_layer_norm(h, weight, bias, eps), h

    return norm


class _Quack(torch.autograd.Function):
    """quack's kernels, which have no autograd of their own and take fp32 weights."""

    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        wide, ctx.module = weight.float(), module
        y, rstd, mean = module.layernorm_fwd(x, wide, bias.float(), eps, True, True)
        ctx.save_for_backward(x, wide, rstd, mean)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, wide, rstd, mean = ctx.saved_tensors
        dx, dw, db = ctx.module.layernorm_bwd(x, wide, dy, rstd, mean)
        return None, dx, dw.to(x.dtype), db.to(x.dtype), None


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's norm, after an addition where there is a residual."""

    def norm(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Any:
        h = x if residual is None else x + residual
        y = _Quack.apply(module, h, weight, bias, eps)
        return y if residual is None else (y, h)

    return norm


def peers(device: str) -> list[Peer]:
    """Liger and quack on a GPU; torch's own op is what eager executes."""
    if device != "cuda":
        return []
    return [
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.rmsnorm", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    return resolve_layer_norm(x, weight, name, residual="residual" in problem.inputs)


def traffic(problem: Problem, backward: bool) -> int:
    """Forward 2*M*N (4*M*N with a residual), backward 3*M*N (4*M*N: dh comes in as well).

    Beside them weight and bias going forward; the weight and both gradients going backward.
    """
    x, weight = bytes_of(problem.inputs["x"]), bytes_of(problem.inputs["weight"])
    forward, back = (4, 4) if "residual" in problem.inputs else (2, 3)
    return (forward + back * backward) * x + (2 + 3 * backward) * weight


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 elements: rows at both ends are those of a small call."""
    shape = Shape("huge", 64, 32) if dry else Shape("huge", 2**19 + 9, 4096)
    problem = draw(shape, torch.bfloat16, "", device, 7)
    return "; ".join(ends_differ(CONTRACT, backend, problem, ("y", "dx"))[1]) or "ok"


SUBJECT = Subject(
    CONTRACT,
    draw,
    hf_eager,
    peers,
    choose,
    gpu=(*GPU, *MODELS, GIGABYTE),
    large=(*GPU, *MODELS),
    cpu=grid(Shape),
    tiny=(Shape("tiny", 3, 64), Shape("tiny_odd", 5, 37)),
    probes=PROBES,
    probed=lambda s: "rows" if s.N <= 8192 else "wide backward" if s.N <= 16_384 else "wide",
    traffic=traffic,
    forms=("", "add"),
    quick=("16x2048", "1x2048", "2048x576"),
    second_look=("opt_6_7b_train", "bert_base_train", "opt_6_7b_decode"),
    host=("opt_6_7b_decode", "gpt2_decode"),
    checked={"tile": Shape("tile", 300, 4096), "wide": Shape("wide_checked", 70, 40_000)},
    timed=on_grid,
    huge=huge,
)
