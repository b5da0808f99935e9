"""Cross-entropy's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.core.losses import loss_sizes
from swathe.kernels.cross_entropy.api import OP, cross_entropy
from swathe.kernels.cross_entropy.shapes import EDGES, Shape

# options by group; "capped" uses everything that changes the logits or their loss
GROUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 6.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2},
}
REDUCTIONS = ("mean", "none", "sum")


def random(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int,
    device: str = "cpu",
    ignored: float = 0.25,
    spread: float = 3.0,
    **options: Any,
) -> Problem:
    """Logits of standard deviation `spread`, labels of which a share is ignored, any seed.

    Drawn on the device itself: on a GPU, shapes may be large.
    """
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    logits = torch.randn(shape.M, shape.V, **on).mul_(spread).to(dtype)
    labels = torch.randint(0, shape.V, (shape.M,), **on)
    labels[torch.rand(shape.M, **on) < ignored] = options.get("ignore_index", -100)
    rows = (shape.M,) if options.get("reduction") == "none" else ()
    arriving = {"loss": torch.randn(rows, **on)}
    return Problem({"logits": logits}, arriving, {"labels": labels, **options}, shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape in every group, reductions in turn."""
    for group, options in GROUPS.items():
        for index, shape in enumerate(EDGES):
            turn: dict[str, Any] = {"reduction": REDUCTIONS[index % 3]}
            if index % 6 == 3:
                turn["num_items"] = torch.tensor(shape.M * 3, device=device)
            drawn = {"seed": 1000 * seed + index, "device": device, **options, **turn}
            yield Case(group, random(shape, dtype, **drawn))


def gold(problem: Problem) -> Outputs:
    """The eager formula in fp64."""
    return problem.to(torch.float64).run(CONTRACT.on("eager"))


def as_hf(
    logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0, **rest: Any
) -> Tensor:
    """HF's order of roundings: logits scaled and capped in their own dtype, the loss in fp32."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return cross_entropy(logits.float(), implementation="eager", **rest)


def baseline(problem: Problem) -> Outputs:
    """HF's ForCausalLMLoss, after Cohere's scale and Gemma2's cap."""
    return problem.run(as_hf)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas of loss and dlogits on absolute values."""
    logits, options = problem.inputs["logits"].double(), dict(problem.options)
    loss, dlogits = loss_sizes(logits, problem.arriving["loss"].double(), **options)
    return {"loss": loss, "dlogits": dlogits}


def exactly(problem: Problem, ours: Outputs, eager: Outputs) -> list[str]:
    """Ignored rows get gradients of exactly zero."""
    ignored = problem.options["labels"] == problem.options.get("ignore_index", -100)
    if ours["dlogits"][ignored].any():
        return [f"dlogits {problem.label}: rows that are ignored have a gradient"]
    return []


CONTRACT = Contract(
    OP,
    cross_entropy,
    cases,
    gold,
    baseline,
    magnitudes,
    exactly=exactly,
    pooled=lambda name: name != "loss",
)
