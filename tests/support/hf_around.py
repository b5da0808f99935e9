"""Tiny models on every kernel at once, for tests of what stands around a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.hf_patching import BACKEND, tiny
from support.tiny_causal import batch
from swathe.modeling.hf.patching.patch import patch
from swathe.modeling.hf.patching.report import Report

MODELS = ("llama", "qwen3", "gemma2")
# what a CPU's user gets, and the head that answers lazily, which no CPU's kernel serves
BACKENDS = ("auto", "eager")
OPS = {"rms_norm", "rotary", "gated_mlp_act", "residual_norm"}


def fully(model: nn.Module, backend: str = "auto") -> Report:
    """Patch with everything, and see that everything was."""
    report = patch(model, backend=backend)
    lazy = backend == "eager" or BACKEND == "eager"
    loss = "linear_cross_entropy" if lazy else "cross_entropy"
    assert ops_of(report) == {*OPS, loss}, report
    return report


def ops_of(report: Report) -> set[str]:
    """What was patched; qk_norm_rotary is a rotary."""
    return {row.op.removeprefix("qk_norm_") for row in report.patched}


def training(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model in training mode."""
    return tiny(model_type, dtype, **changes).train()


def step(model: Any, **arguments: Any) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter that gets one, in a training step."""
    model.zero_grad()
    loss = model(**{**batch(), "use_cache": False, **arguments}).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, by the names that the parameters have without torch.compile."""
    return {
        name.removeprefix("_orig_mod."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
