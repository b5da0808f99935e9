"""What a call costs in Python, layer by layer: the chosen backend, its name, "auto", and peers.

GPU kernels are only enqueued while the clock runs. On a CPU the kernel itself is in the numbers,
so they are taken on few rows.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch

from bench.subject import Subject, size
from bench.timing import Call, Timing, host_time, interleave


def ways(of: Subject, shape: Any, backend: str, device: str) -> dict[str, Call]:
    """Every way to call the op on one shape in bf16, by name."""
    problem = of.draw(shape, torch.bfloat16, of.forms[0], device, 0)
    public = of.contract.function
    chosen = partial(public, implementation=of.choose(problem, backend))
    first = next(iter(problem.inputs.values()))
    functions = {
        "with a Choice": chosen,
        "by name": partial(public, implementation=backend),
        "auto": public,
        "eager": of.eager,
    }
    for peer in of.peers(device):
        # one that has no such form says so when it is prepared
        with suppress(NotImplementedError):
            functions |= {} if peer.absent else {peer.name: peer.prepare(problem)}
    return {
        "torch.empty_like": lambda: torch.empty_like(first),
        **{name: problem.call(f, backward=False) for name, f in functions.items()},
        **{
            f"{name}, forward+backward": problem.call(functions[name])
            for name in functions
            if name not in ("by name", "auto", "eager")
        },
    }


def host_rows(
    of: Subject, shape: Any, backend: str, device: str, rounds: int
) -> list[dict[str, Any]]:
    """One row for each way: host microseconds, median of interleaved rounds."""
    calls = ways(of, shape, backend, device)
    for call in calls.values():
        call()
    samplers = {name: _sampler(call) for name, call in calls.items()}
    samples = interleave(samplers, rounds)
    rows = []
    for name, found in samples.items():
        timing = Timing.of(found)
        facts = {"op": of.op, "shape": shape.name, "size": size(shape), "way": name}
        spread = {"min_us": round(timing.least, 2), "max_us": round(timing.most, 2)}
        rows.append({**facts, "median_us": round(timing.median, 2), **spread})
    return rows


def _sampler(call: Call) -> Any:
    return lambda: host_time(call, calls=50, batches=1).median
