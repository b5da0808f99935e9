"""QK norm and rotary under measurement: HF's two norms and apply_rotary_pos_emb in one call."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import library, overwriting
from bench.huge import ends_differ
from bench.ops import rotary
from bench.subject import Function, Peer, Subject, each_once, head_grid, on_grid
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.qk_norm_rotary.api import resolve_qk_norm_rotary
from swathe.kernels.qk_norm_rotary.contract import CONTRACT, hf_eager, random
from swathe.kernels.qk_norm_rotary.shapes import GPU, MODELS, Shape

PROBES = {
    "whole": Shape("probe_whole", 1, 3, 4, 2, 64, 64),
    "tail": Shape("probe_tail", 1, 3, 4, 2, 80, 32),
}


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """Qwen3's roundings; "gemma" has Gemma3's. Equal angles for both members of a pair."""
    group = form or "llama"
    problem = random(shape, dtype, seed=seed, device=device, group=group, compact=True)
    twice = {n: torch.cat((problem.options[n],) * 2, -1) for n in ("cos", "sin")}
    return problem.given(**twice)


def torch_own(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float, **rest: Any
) -> Any:
    """F.rms_norm over each head, then the rotation as HF writes it."""
    q, k = (
        F.rms_norm(x, x.shape[-1:], offset + w if offset else w, eps)
        for x, w in ((q, q_weight), (k, k_weight))
    )
    tables = {name: value for name, value in rest.items() if name != "norm_casting"}
    return rotary.hf_eager(q=q, k=k, **tables)


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's norm of q, that of k, and its rotation, which overwrites both."""
    casting = problem.options["norm_casting"]

    def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        return module.liger_rms_norm(x, weight, eps, offset, casting, in_place=False)

    def call(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float,
        cos: Tensor, sin: Tensor, **_: Any,
    ) -> Any:  # fmt: skip
        q = normed(q.transpose(1, 2), q_weight, eps, offset).transpose(1, 2)
        k = normed(k.transpose(1, 2), k_weight, eps, offset).transpose(1, 2)
        return module.liger_rope(q, k, cos[None], sin[None])

    return overwriting(call, problem)


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's norm of q, that of k, and its rotation of each."""
    turn, offset = rotary.quack(module, problem), problem.options["offset"]
    norm = import_module("quack.rmsnorm").rmsnorm

    def call(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, **_: Any) -> Any:
        q, k = (
            norm(x.transpose(1, 2), w + offset if offset else w, eps=eps).transpose(1, 2)
            for x, w in ((q, q_weight), (k, k_weight))
        )
        return turn(q=q, k=k)

    return call


def peers(device: str) -> list[Peer]:
    """torch, and on a GPU what Liger and quack have for the parts: none has the whole."""
    own = Peer("torch", lambda problem: torch_own)
    if device != "cuda":
        return [own]
    return [
        own,
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.rotary", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    inputs = problem.inputs
    return resolve_qk_norm_rotary(inputs["q"], inputs["q_weight"], problem.options["cos"], name)


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
    gpu=(*GPU, *MODELS),
    cpu=head_grid(Shape),
    tiny=(Shape("tiny", 2, 3, 3, 1, 16, 16), Shape("tiny_tail", 1, 5, 2, 1, 14, 6)),
    probes=PROBES,
    probed=lambda s: "whole" if s.D == s.R else "tail",
    traffic=each_once,
    forms=("", "gemma"),
    quick=("16x2048", "1x2048", "2048x576"),
    second_look=("qwen3_8b_train", "qwen3_8b_decode"),
    host=("qwen3_8b_decode",),
    checked={"tile": Shape("tile", 2, 700, 32, 8, 128, 128)},
    timed=on_grid,
    huge=huge,
)
