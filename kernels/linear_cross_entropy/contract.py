"""Linear cross-entropy's side of the contract: its cases, gold, baseline and magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.contract import Case, Contract, Outputs, Problem
from swathe.kernels.core.losses import LossOptions, eager_loss, loss_sizes
from swathe.kernels.core.testing import UNIT
from swathe.kernels.linear_cross_entropy.api import OP, linear_cross_entropy
from swathe.kernels.linear_cross_entropy.shapes import EDGES, Shape

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
    bias: bool = True,
    ignored: float = 0.25,
    **options: Any,
) -> Problem:
    """Logits of standard deviation around 1.5, labels of which a share is ignored, any seed."""
    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    inputs = {
        "hidden": torch.randn(shape.M, shape.K, **on).to(dtype),
        "weight": torch.randn(shape.V, shape.K, **on).mul_(1.5 * shape.K**-0.5).to(dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(shape.V, **on).mul_(0.3).to(dtype)
    labels = torch.randint(0, shape.V, (shape.M,), **on)
    labels[torch.rand(shape.M, **on) < ignored] = options.get("ignore_index", -100)
    rows = (shape.M,) if options.get("reduction") == "none" else ()
    arriving = {"loss": torch.randn(rows, **on)}
    return Problem(inputs, arriving, {"labels": labels, **options}, shape.name)


def cases(dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every edge shape in every group, reductions in turn, in one chunk and in several."""
    for group, options in GROUPS.items():
        for index, shape in enumerate(EDGES):
            turn: dict[str, Any] = {"reduction": REDUCTIONS[index % 3]}
            if index % 2:
                turn["chunk_rows"] = 16
            drawn = {"seed": 1000 * seed + index, "device": device, **options, **turn}
            yield Case(group, random(shape, dtype, **drawn))


def gold(problem: Problem) -> Outputs:
    """The eager formula in fp64."""
    return problem.to(torch.float64).run(CONTRACT.on("eager"))


def as_hf(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    labels: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """HF's roundings: logits made, scaled and capped in their own dtype, the loss in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    options = LossOptions(smoothing=label_smoothing, z_loss=z_loss)
    return eager_loss(logits.float(), labels, options, reduction, num_items)


def baseline(problem: Problem) -> Outputs:
    """HF's lm_head and ForCausalLMLoss, with Cohere's scale and Gemma2's cap."""
    return problem.run(as_hf)


def magnitudes(problem: Problem) -> Outputs:
    """The formulas on absolute values; below fp32, dx is rounded for the matrix product."""
    dtype = problem.inputs["hidden"].dtype
    hidden, weight = (problem.inputs[k].double() for k in ("hidden", "weight"))
    bias = problem.inputs.get("bias", weight.new_zeros(weight.shape[0])).double()
    options = {k: v for k, v in problem.options.items() if k != "chunk_rows"}
    logits = hidden @ weight.T + bias
    sizes = hidden.abs() @ weight.abs().T + bias.abs()
    arriving = problem.arriving["loss"].double()
    # the contract counts in 16 * 2^-24
    units = 0.0 if dtype == torch.float32 else 1.02 * UNIT[dtype] * 2.0**20
    loss, dx = loss_sizes(logits, arriving, errors=sizes, rounding=units, **options)
    found = {"loss": loss, "dhidden": dx @ weight.abs(), "dweight": dx.T @ hidden.abs()}
    return {**found, "dbias": dx.sum(0)}


CONTRACT = Contract(
    OP,
    linear_cross_entropy,
    cases,
    gold,
    baseline,
    magnitudes,
    bounds=lambda name: "linear_cross_entropy",
    pooled=lambda name: name != "loss",
)
