"""Head and loss under measurement: hidden states to the mean loss, gradients of both factors.

Bound by three matrix products, 6*M*K*V flops, not by bytes; what is compared is time and memory.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import library, overwriting
from bench.subject import Function, Peer, Subject, each_once
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import Choice
from swathe.kernels.linear_cross_entropy.api import resolve_linear_cross_entropy
from swathe.kernels.linear_cross_entropy.contract import CONTRACT, as_hf, random
from swathe.kernels.linear_cross_entropy.shapes import GPU, MODELS, Shape

FORMS: dict[str, dict[str, Any]] = {"": {}, "capped": {"softcap": 30.0}}
PROBES = {
    "one chunk": Shape("probe_one_chunk", 70, 64, 1000),
    "chunks": Shape("probe_chunks", 1500, 64, 5000),
}


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """A tenth of the labels ignored, no bias; "capped" has Gemma2's cap."""
    options = {"bias": False, "ignored": 0.1, **FORMS[form]}
    return random(shape, dtype, seed=seed, device=device, **options)


def torch_own(problem: Problem) -> Function:
    """F.linear_cross_entropy, chunked as torch chooses."""
    if "softcap" in problem.options:
        raise NotImplementedError("torch has no softcap")
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels).float()


def liger(module: ModuleType, problem: Problem) -> Function:
    """Liger's loss with the weight gradient summed in fp32, as ours is."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Any:
        function = module.liger_fused_linear_cross_entropy
        wide = {"softcap": softcap, "accum_dtype": torch.float32}
        return function(hidden, weight, labels, **wide).float()

    return overwriting(loss, problem)


def quack(module: ModuleType, problem: Problem) -> Function:
    """quack's chunked loss."""
    if "softcap" in problem.options:
        raise NotImplementedError("quack has no softcap")
    function = module.chunked_linear_cross_entropy
    return lambda hidden, weight, labels: function(hidden, weight, labels).float()


def peers(device: str) -> list[Peer]:
    """torch from 2.13 on, and on a GPU Liger and quack."""
    missing = None if hasattr(F, "linear_cross_entropy") else "torch has it from 2.13 on"
    own = Peer("torch", torch_own, missing)
    if device != "cuda":
        return [own]
    return [
        own,
        library("liger", "liger_kernel.transformers.functional", liger),
        library("quack", "quack.linear_cross_entropy", quack),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a loss chooses."""
    hidden, weight = problem.inputs["hidden"], problem.inputs["weight"]
    softcap = problem.options.get("softcap")
    return resolve_linear_cross_entropy(hidden, weight, name, softcap=softcap)


SUBJECT = Subject(
    CONTRACT,
    draw,
    as_hf,
    peers,
    choose,
    gpu=(*sorted(GPU, key=lambda s: s.name != "llama_8b_train"), *MODELS),
    cpu=MODELS,
    tiny=(Shape("tiny", 9, 16, 64), Shape("tiny_odd", 12, 8, 37)),
    probes=PROBES,
    probed=lambda s: "one chunk" if s.M < 1024 else "chunks",
    traffic=each_once,
    forms=tuple(FORMS),
    second_look=("llama_1b_train",),
    host=("llama_1b",),
    checked={"chunks": Shape("chunks_checked", 2500, 256, 8192)},
)
