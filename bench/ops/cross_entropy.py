"""Cross-entropy under measurement: rows of logits as a head leaves them, mean over the labels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import library, overwriting
from bench.huge import ends_differ
from bench.subject import Function, Peer, Subject, each_once, grid, on_grid
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.cross_entropy.api import resolve_cross_entropy
from swathe.kernels.cross_entropy.contract import CONTRACT, as_hf, random
from swathe.kernels.cross_entropy.shapes import GPU, MODELS, Shape

FORMS: dict[str, dict[str, Any]] = {"": {}, "capped": {"softcap": 30.0}}
PROBES = {"narrow": Shape("probe_narrow", 3, 1000), "wide": Shape("probe_wide", 3, 50_257)}


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """A tenth of many labels ignored; "capped" has Gemma2's cap."""
    ignored = 0.1 if shape.M > 1 else 0.0  # the mean of no labels is NaN
    return random(shape, dtype, seed=seed, device=device, ignored=ignored, **FORMS[form])


def torch_own(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """F.cross_entropy on the logits as they are."""
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, labels).float()


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's loss, which writes the gradient over the logits."""

    def loss(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
        return module.liger_cross_entropy(logits, labels, softcap=softcap).float()

    return overwriting(loss, problem)


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's loss, its gradient in a tensor of its own."""
    if "softcap" in problem.options:
        raise NotImplementedError("quack has no softcap")
    return lambda logits, labels: module.cross_entropy(logits, labels).float()


def peers(device: str) -> list[Peer]:
    """torch, and on a GPU Liger and quack."""
    own = Peer("torch", lambda problem: torch_own)
    if device != "cuda":
        return [own]
    return [
        own,
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.cross_entropy", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a loss chooses."""
    return resolve_cross_entropy(
        problem.inputs["logits"], name, softcap=problem.options.get("softcap")
    )


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 logits: rows at both ends are those of a small call."""
    shape = Shape("huge", 64, 33) if dry else Shape("huge", 16_800, 128_256)
    problem = random(shape, torch.bfloat16, seed=7, device=device, reduction="none")
    return "; ".join(ends_differ(CONTRACT, backend, problem, ("loss", "dlogits"))[1]) or "ok"


SUBJECT = Subject(
    CONTRACT,
    draw,
    as_hf,
    peers,
    choose,
    gpu=(*GPU, *MODELS, Shape("one_row", 1, 128_256)),
    cpu=(*grid(Shape), *MODELS),
    tiny=(Shape("tiny", 9, 64), Shape("tiny_odd", 12, 37)),
    probes=PROBES,
    probed=lambda s: "narrow" if s.V <= 1024 else "wide",
    traffic=each_once,
    forms=tuple(FORMS),
    quick=("16x4096", "1x2048", "llama_3"),
    second_look=("llama_3_train",),
    host=("llama_3",),
    checked={"wide": Shape("wide_checked", 300, 50_257)},
    timed=on_grid,
    huge=huge,
)
