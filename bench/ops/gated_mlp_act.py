"""Gated activations under measurement: act(gate) * up, from two tensors or from one packed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.contenders import library, overwriting
from bench.huge import ends_differ
from bench.subject import Function, Peer, Subject, each_once, grid, on_grid
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.gated_mlp_act import eager
from swathe.kernels.gated_mlp_act.api import ALPHA, LIMIT, resolve_gated_mlp_act
from swathe.kernels.gated_mlp_act.contract import CONTRACT, random
from swathe.kernels.gated_mlp_act.shapes import GPU, MODELS, Shape

FORMS: dict[str, dict[str, Any]] = {
    "": {"act": "silu"},
    "gelu_tanh": {"act": "gelu_tanh"},
    "packed": {"act": "silu", "packed": "halves"},
    "gpt_oss": {"act": "gpt_oss", "packed": "interleaved"},
}
PROBES = {
    "tile": Shape("probe_tile", 3, 4096),
    "odd": Shape("probe_odd", 3, 4095),
}


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """HF's roundings."""
    options = {"casting": "llama", **FORMS[form]}
    return random(shape, dtype, seed=seed, device=device, **options)


def hf_eager(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    act: str,
    casting: str,
    packed: str = "halves",
    limit: float = LIMIT,
    alpha: float = ALPHA,
) -> Tensor:
    """What transformers' MLP executes between its projections."""
    return eager.gated_mlp_act(gate, up, act, limit, alpha, casting, packed)


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's SwiGLU and GEGLU, whose backward overwrites gate and up."""
    known = {"silu": module.liger_swiglu, "gelu_tanh": module.liger_geglu}
    if "up" not in problem.inputs or problem.options["act"] not in known:
        raise NotImplementedError("liger has silu and gelu_tanh of two tensors")
    function = known[problem.options["act"]]
    return overwriting(lambda gate, up, **_: function(gate, up), problem)


def peers(device: str) -> list[Peer]:
    """Liger on a GPU; torch has no such op, quack has it inside a matrix product only."""
    if device != "cuda":
        return []
    return [library("liger", "liger_kernel.transformers.functional", liger)]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    o, packed = problem.options, "up" not in problem.inputs
    return resolve_gated_mlp_act(
        problem.inputs["gate"],
        name,
        act=o["act"],
        casting=o["casting"],
        packed=o["packed"] if packed else None,
    )


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 elements: rows at both ends are those of a small call."""
    shape = Shape("huge", 64, 32) if dry else Shape("huge", 2**17 + 9, 16_384)
    problem = draw(shape, torch.bfloat16, "", device, 7)
    return "; ".join(ends_differ(CONTRACT, backend, problem, ("y", "dgate", "dup"))[1]) or "ok"


SUBJECT = Subject(
    CONTRACT,
    draw,
    hf_eager,
    peers,
    choose,
    gpu=(*sorted(GPU, key=lambda s: "train" not in s.name), *MODELS),
    cpu=grid(Shape),
    tiny=(Shape("tiny", 3, 64), Shape("tiny_odd", 5, 37)),
    probes=PROBES,
    probed=lambda s: "odd" if s.N % 8 else "tile",
    traffic=each_once,
    forms=tuple(FORMS),
    quick=("16x2048", "1x2048", "2048x576"),
    second_look=("llama_8b_train", "llama_8b_decode"),
    host=("llama_8b_decode",),
    checked={"tile": Shape("tile", 300, 14_336), "odd": Shape("odd_checked", 70, 2881)},
    timed=on_grid,
    huge=huge,
)
