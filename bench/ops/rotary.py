"""Rotary embedding under measurement: q and k as projections leave them, turned in one call."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.contenders import library, overwriting
from bench.huge import ends_differ
from bench.subject import Function, Peer, Subject, bytes_of, head_grid, on_grid
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.rotary.api import resolve_rotary
from swathe.kernels.rotary.contract import CONTRACT, hf_eager, random
from swathe.kernels.rotary.shapes import GPU, MODELS, Shape

PROBES = {
    "whole": Shape("probe_whole", 1, 3, 4, 2, 64, 64),
    "tail": Shape("probe_tail", 1, 3, 4, 2, 80, 32),
}

GIGABYTE = Shape("gigabyte", 16, 8192, 32, 8, 128, 128)  # in bf16


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """HF's casting; equal angles for both members of a pair, which peers take for granted."""
    options: dict[str, Any] = {"casting": "llama", "interleaved": form == "interleaved"}
    problem = random(shape, dtype, seed=seed, device=device, compact=True, **options)
    if form == "interleaved":
        return problem
    twice = {n: torch.cat((problem.options[n],) * 2, -1) for n in ("cos", "sin")}
    return problem.given(**twice)


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's rotation, which overwrites q and k, and in the backward what arrives."""
    if problem.options["interleaved"]:
        raise NotImplementedError("liger rotates halves, not neighbours")

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return module.liger_rope(q, k, cos[None], sin[None])

    return overwriting(turn, problem)


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's rotation of (B, S, H, D): a launch for q and one for k."""
    half, interleaved = problem.options["rotary_dim"] // 2, problem.options["interleaved"]
    tables = [problem.options[name][:, :half].contiguous() for name in ("cos", "sin")]

    def turn(q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        q, k = (
            module.apply_rotary_emb(t.transpose(1, 2), *tables, interleaved).transpose(1, 2)
            for t in (q, k)
        )
        return q, k

    return turn


def peers(device: str) -> list[Peer]:
    """Liger and quack on a GPU; torch has no such op."""
    if device != "cuda":
        return []
    return [
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.rotary", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    return resolve_rotary(problem.inputs["q"], problem.options["cos"], name)


def traffic(problem: Problem, backward: bool) -> int:
    """q, k and the tables in, q and k out, each way: the backward needs neither q nor k."""
    heads = bytes_of(*problem.inputs.values())
    tables = bytes_of(problem.options["cos"], problem.options["sin"])
    return (1 + backward) * (2 * heads + tables)


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 elements: sequences at both ends are those of a small call."""
    shape = Shape("huge", 33, 5, 4, 1, 16, 16) if dry else Shape("huge", 8193, 64, 32, 1, 128, 128)
    problem = draw(shape, torch.bfloat16, "", device, 7)
    return "; ".join(ends_differ(CONTRACT, backend, problem, ("yq", "yk", "dq", "dk"))[1]) or "ok"


SUBJECT = Subject(
    CONTRACT,
    draw,
    hf_eager,
    peers,
    choose,
    gpu=(*GPU, *MODELS, GIGABYTE),
    large=(*GPU, *MODELS),
    cpu=head_grid(Shape),
    tiny=(Shape("tiny", 2, 3, 3, 1, 16, 16), Shape("tiny_tail", 1, 5, 2, 1, 14, 6)),
    probes=PROBES,
    probed=lambda s: "whole" if s.D == s.R else "tail",
    traffic=traffic,
    forms=("", "interleaved"),
    quick=("16x2048", "1x2048", "2048x576"),
    second_look=("llama_8b_train", "llama_8b_decode"),
    host=("llama_8b_decode", "smollm2_135m_decode"),
    checked={"tile": Shape("tile", 2, 700, 32, 8, 128, 128)},
    timed=on_grid,
    huge=huge,
)
