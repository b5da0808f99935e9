"""What a call costs in Python, layer by layer: the launcher, the chosen backend, the public name.

GPU kernels are only enqueued while the clock runs. On a CPU the kernel itself is in the numbers,
so they are taken on one row.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import VARIANTS, Cell, draw
from bench.measure import call_on
from bench.timing import Call, Timing, host_time, interleave
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import resolve_rms_norm, rms_norm
from swathe.kernels.norm.contract import EPS
from swathe.kernels.norm.shapes import Shape

_FORWARD, _BOTH = VARIANTS[0], VARIANTS[1]


def ways(shape: Shape, backend: str, device: str) -> dict[str, Call]:
    """Every way to call the op on one shape in bf16, by name."""
    problem = draw(Cell.of(shape, "bfloat16", _FORWARD), device, 0)
    x, weight = problem.x, problem.weight
    launcher: dict[str, Call] = {}
    if backend != "eager":
        launchers = import_module(f"swathe.kernels.norm._{backend}")
        launcher["launcher"] = lambda: launchers.forward(x, weight, EPS, 0.0, "llama")
    choice = resolve_rms_norm(x, weight, backend)
    both = {
        "with a Choice, forward+backward": lambda x, w, r: rms_norm(
            x, w, EPS, implementation=choice
        ),
        "F.rms_norm, forward+backward": lambda x, w, r: F.rms_norm(x, w.shape, w, EPS),
    }
    return {
        "torch.empty_like": lambda: torch.empty_like(x),
        **launcher,
        "with a Choice": lambda: rms_norm(x, weight, EPS, implementation=choice),
        "by name": lambda: rms_norm(x, weight, EPS, implementation=backend),
        "auto": lambda: rms_norm(x, weight, EPS),
        "F.rms_norm": lambda: F.rms_norm(x, weight.shape, weight, EPS),
        "eager": lambda: eager.rms_norm(x, weight, EPS, 0.0, "llama", None),
        **{name: call_on(norm, problem, _BOTH) for name, norm in both.items()},
    }


def host_rows(shape: Shape, backend: str, device: str, rounds: int = 15) -> list[dict[str, Any]]:
    """One row for each way: host microseconds, median of interleaved rounds."""
    calls = ways(shape, backend, device)
    for call in calls.values():
        call()
    samplers = {name: _sampler(call) for name, call in calls.items()}
    samples = interleave(samplers, rounds)
    rows = []
    for name, found in samples.items():
        timing = Timing.of(found)
        facts = {"op": "rms_norm", "shape": shape.name, "M": shape.M, "N": shape.N, "way": name}
        spread = {"min_us": round(timing.least, 2), "max_us": round(timing.most, 2)}
        rows.append({**facts, "median_us": round(timing.median, 2), **spread})
    return rows


def _sampler(call: Call) -> Any:
    return lambda: host_time(call, calls=50, batches=1).median
