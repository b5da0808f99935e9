"""RMSNorm under measurement: rows of features, with and without the residual's addition."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import library
from bench.huge import ends_differ
from bench.subject import Function, Peer, Subject, bytes_of
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import resolve_rms_norm
from swathe.kernels.norm.contract import CONTRACT, EPS, random
from swathe.kernels.norm.shapes import GPU, MODELS, Shape

# rows (1, 16, 2048) by columns (576, 2048, 4096): MODELS and one more
CPU = tuple(sorted((*MODELS, Shape("smollm2_135m_batch", 16, 576)), key=lambda s: (s.N, s.M)))
PROBES = {
    "rows": Shape("probe_rows", 3, 1024),
    "wide backward": Shape("probe_wide_backward", 3, 10_000),
    "wide": Shape("probe_wide", 3, 33_001),
}
HUGE = (2**19 + 9, 4096)  # 2^31 elements and nine rows

GIGABYTE = Shape("gigabyte", 131_072, 4096)  # in bf16


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """HF's casting; `form` "add" brings a residual."""
    options: dict[str, Any] = {"casting": "llama", "residual": form == "add"}
    return random(shape, dtype, seed=seed, device=device, **options)


def hf_eager(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    casting: str,
    residual: Tensor | None = None,
) -> Any:
    """What transformers' LlamaRMSNorm executes, op for op, after the decoder layer's addition."""
    return eager.rms_norm(x, weight, eps, offset, casting, residual)


def torch_own(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, **_: Any):
    """F.rms_norm, after an addition where there is a residual."""
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, eps), h


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's norm, told not to overwrite the gradient that every timed call shares."""

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, **_: Any):
        if residual is None:
            return module.liger_rms_norm(x, weight, eps, in_place=False)
        return module.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)

    return norm


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's norm; `prenorm` returns the sum too."""

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, **_: Any):
        return module.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=residual is not None)

    return norm


def peers(device: str) -> list[Peer]:
    """torch, and on a GPU Liger and quack."""
    own = Peer("torch", lambda problem: torch_own)
    if device != "cuda":
        return [own]
    return [
        own,
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.rmsnorm", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    return resolve_rms_norm(x, weight, name, residual="residual" in problem.inputs)


def traffic(problem: Problem, backward: bool) -> int:
    """Forward 2*M*N (4*M*N with a residual), backward 3*M*N (4*M*N: dh comes in as well).

    Beside them the weight once each way and its gradient.
    """
    x, weight = bytes_of(problem.inputs["x"]), bytes_of(problem.inputs["weight"])
    forward, back = (4, 4) if "residual" in problem.inputs else (2, 3)
    return (forward + back * backward) * x + (1 + 2 * backward) * weight


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 elements: rows at both ends are those of a small call, dw is the fp64 sum."""
    rows, columns = (64, 32) if dry else HUGE
    problem = draw(Shape("huge", rows, columns), torch.bfloat16, "", device, 7)
    found, wrong = ends_differ(CONTRACT, backend, problem, ("y", "dx"))
    x, dy = problem.inputs["x"], problem.arriving["y"]
    dw = torch.zeros(columns, dtype=torch.float64, device=device)
    for start in range(0, rows, 32768):
        h = x[start : start + 32768].double()
        h *= torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
        dw += (h * dy[start : start + 32768]).sum(0)
    error = ((found["dweight"].double() - dw).norm() / dw.norm()).item()
    if not error < 4e-3:
        wrong.append(f"dweight: relative error {error:.3g}, allowed 0.004")
    return "; ".join(wrong) or "ok"


SUBJECT = Subject(
    CONTRACT,
    draw,
    hf_eager,
    peers,
    choose,
    gpu=(*sorted(GPU, key=lambda s: "train" not in s.name), *MODELS, GIGABYTE),
    large=(*GPU, *MODELS),
    cpu=CPU,
    tiny=(Shape("tiny", 3, 64), Shape("tiny_odd", 5, 37)),
    probes=PROBES,
    probed=lambda s: "rows" if s.N <= 8192 else "wide backward" if s.N <= 16_384 else "wide",
    traffic=traffic,
    forms=("", "add"),
    quick=("llama_1b_batch", "llama_1b_decode", "smollm2_135m"),
    second_look=(
        *("llama_8b_train", "llama_1b_train", "llama_8b", "llama_8b_batch", "llama_8b_decode"),
    ),
    host=("llama_8b_decode", "smollm2_135m_decode"),
    checked={"tile": Shape("tile", 300, 4096), "wide": Shape("wide_checked", 70, 40_000)},
    huge=huge,
)
