"""Compile every kernel a model needs before the first real step, without a trace left in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from swathe.kernels.ahead import HEADS, compile_ahead
from swathe.kernels.core.launch import Launcher
from swathe.kernels.core.offline import Compiled


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did: runs of the model, kernels compiled (or loaded from disk), seconds."""

    runs: int
    kernels: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernels} kernels ready after {self.runs} runs, {self.seconds:.1f} s"


@overload
def warmup(
    model: nn.Module, *, tokens: Sequence[int] = ..., training: bool | None = None
) -> Warmed: ...


@overload
def warmup(
    *, target: str, heads: Sequence[tuple[int, int]] = ..., dtypes: Sequence[str] = ...
) -> Compiled: ...


def warmup(
    model: nn.Module | None = None,
    *,
    tokens: Sequence[int] = (1, 16, 128, 1024),
    training: bool | None = None,
    target: str | None = None,
    heads: Sequence[tuple[int, int]] = HEADS,
    dtypes: Sequence[str] = ("bfloat16",),
) -> Warmed | Compiled:
    """Run `model` on token id 0 at each length in `tokens`, forward and, for training, backward.

    Without training, one more token follows each, with what the model cached; a long cache, which
    several programs share, takes kernels of its own, and 1024 stands for those. No size that varies
    from call to call is compiled in, so a few lengths stand for all of them; Triton keeps what it
    compiles on disk, so that later processes load it. `training` defaults to model.training; a
    fused loss (loss_implementation) is run with it. Lengths above what the model names as its
    `longest_input` become that. Gradients, buffers, random state and the modes of the model and
    its modules are left as they were.

    With a `target` such as "sm_90" instead of a model, attention's kernels are compiled for a GPU
    that is not here, for heads of (D, E) features, and printed one by one; nothing runs. A GPU
    finds them if Triton and the path of its cache are the same, which only a run there confirms.
    Raises ValueError for lengths below 1, for both or neither of model and target, and for a
    target, dtype or size of heads that has no kernels; BackendUnavailable without Triton.
    """
    if (model is None) == (target is None):
        raise ValueError(
            "warmup: give a model to run here, or target='sm_90' to compile for a GPU elsewhere; "
            f"given were {'neither' if model is None else 'both'}"
        )
    if target is not None:
        return compile_ahead(target, heads=heads, dtypes=dtypes, tell=print)
    assert model is not None
    if not tokens or min(tokens) < 1:
        raise ValueError(
            f"warmup: tokens={tuple(tokens)}; give lengths of 1 or more, such as (16,)"
        )
    training = model.training if training is None else training
    before, began = Launcher.compiled_count(), time.perf_counter()
    device = next(model.parameters()).device
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    longest = getattr(model, "longest_input", max(tokens))
    lengths = list(dict.fromkeys(min(length, longest) for length in tokens))
    with torch.random.fork_rng(devices):
        try:
            model.train(training)
            for length in lengths:
                _run(model, torch.zeros(1, length, dtype=torch.long, device=device), training)
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
    seconds = time.perf_counter() - began
    return Warmed(len(lengths), Launcher.compiled_count() - before, seconds)


def _run(model: nn.Module, ids: Tensor, training: bool) -> None:
    # a fused loss over the vocabulary has kernels of its own, which only a call with labels reaches
    fused = getattr(getattr(model, "config", None), "loss_implementation", None)
    over_vocabulary = training and fused is not None and bool(getattr(model, "head_path", ""))
    labels = {"labels": ids} if over_vocabulary else {}
    with nullcontext() if training else torch.inference_mode():
        output: Any = model(input_ids=ids, **labels)
        cache = None if training else getattr(output, "past_key_values", None)
        if cache is not None:
            model(input_ids=ids[:, :1], past_key_values=cache)
    first = output[0]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if training and wanted and first.requires_grad:
        # grad() rather than backward(): nothing is added to .grad, no hook of an optimiser runs
        torch.autograd.grad(first.float().square().mean(), wanted, allow_unused=True)
