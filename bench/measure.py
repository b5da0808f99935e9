"""One cell measured: every contender checked against fp64, then timed beside the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Cell, Variant, draw, gate, gold
from bench.contenders import PEER_ERRORS, Contender, Norm
from bench.timing import (
    Call,
    Copy,
    Replay,
    Timing,
    host_time,
    input_sets,
    peak_bytes,
    time_on_cpu,
    time_on_gpu,
)
from swathe.kernels.norm.contract import Outputs, Problem

Row = dict[str, Any]
COPY = "copy"
ROUNDS = {"cpu": 15, "cuda": 40}


def call_on(norm: Norm, problem: Problem, variant: Variant) -> Callable[[], Outputs]:
    """A call without arguments: the norm, and its backward where the variant asks for it."""
    x, weight, r = (
        None if t is None else t.detach().requires_grad_(variant.backward)
        for t in (problem.x, problem.weight, problem.residual)
    )
    assert x is not None and weight is not None
    if not variant.backward:
        return lambda: _named(norm(x, weight, r))

    def both() -> Outputs:
        outputs = _named(norm(x, weight, r))
        if r is None:
            dx, dw = torch.autograd.grad(outputs["y"], (x, weight), problem.dy)
            return {"y": outputs["y"], "dx": dx, "dw": dw}
        found, arriving = (outputs["y"], outputs["h"]), (problem.dy, problem.dh)
        dx, dw, dr = torch.autograd.grad(found, (x, weight, r), arriving)
        return {**outputs, "dx": dx, "dw": dw, "dr": dr}

    return both


def _named(result: Tensor | tuple[Tensor, Tensor]) -> Outputs:
    if isinstance(result, Tensor):
        return {"y": result}
    y, h = result
    return {"y": y, "h": h}


def measure(
    cell: Cell,
    device: str,
    contenders: Iterable[Contender],
    *,
    rounds: int | None = None,
    seconds: float = math.inf,
    seed: int = 0,
) -> list[Row]:
    """One row for each contender that is present: its timing, or the error that kept it out.

    On a CPU the rounds of a cell stop early after `seconds`.

    A contender whose outputs are off from fp64 gets no timing, only the reason.
    """
    traffic, variant = cell.traffic(), cell.kind
    problems = [draw(cell, device, seed + i) for i in range(input_sets(device, traffic))]
    truth = gold(problems[0], variant.backward)
    calls: dict[str, list[Call]] = {}
    errors: dict[str, str] = {}
    present = [c for c in contenders if not c.absent]
    for contender in present:
        prepared = _prepared(contender, problems, variant, truth)
        if isinstance(prepared, str):
            errors[contender.name] = prepared
        else:
            calls[contender.name] = prepared
    del truth
    peaks = {name: peak_bytes(each[0], device) for name, each in calls.items()}
    hosts = {name: _host(name, each[0], cell, device, present) for name, each in calls.items()}
    calls[COPY] = Copy(traffic, device, len(problems)).calls()
    timings = _timed(calls, errors, device, rounds or ROUNDS[device], seconds)
    rows = []
    for contender in present:
        row = {**cell.facts(), "backend": contender.name, "ours": contender.ours}
        if contender.name in errors:
            rows.append({**row, "error": errors[contender.name]})
            continue
        speed = _speed(timings[contender.name], timings[COPY], traffic)
        peak = round(peaks[contender.name] / 2**20, 3)
        rows.append({**row, **speed, "host_us": hosts[contender.name], "peak_mib": peak})
    return rows


def _prepared(
    contender: Contender, problems: list[Problem], variant: Variant, truth: Outputs
) -> list[Call] | str:
    first = problems[0]
    try:
        norm = contender.prepare(first.x, first.weight, variant.residual)
        calls = [call_on(norm, problem, variant) for problem in problems]
        reason = gate(calls[0](), truth)
    except PEER_ERRORS as error:
        return f"{type(error).__name__}: {error}"[:2000]
    if reason:
        return f"gate: {reason}"
    return list(calls)


def _timed(
    calls: dict[str, list[Call]],
    errors: dict[str, str],
    device: str,
    rounds: int,
    seconds: float,
) -> dict[str, Timing]:
    if device == "cpu":
        return time_on_cpu({name: each[0] for name, each in calls.items()}, rounds, seconds)
    replays = {}
    for name, each in calls.items():
        try:
            replays[name] = Replay(each)
        except PEER_ERRORS as error:
            errors[name] = f"CUDA graph capture: {type(error).__name__}: {error}"[:2000]
    return time_on_gpu(replays, rounds)


def _host(name: str, call: Call, cell: Cell, device: str, present: list[Contender]) -> float | None:
    """Microseconds of Python a call; on a CPU those of a call on no rows.

    None for torch.compile on a CPU, which would compile once more for no rows.
    """
    if device == "cuda":
        return round(host_time(call).median, 2)
    if name == "compile":
        return None
    contender = next(c for c in present if c.name == name)
    problem = draw(replace(cell, M=0), device, 0)
    norm = contender.prepare(problem.x, problem.weight, cell.kind.residual)
    empty = call_on(norm, problem, cell.kind)
    empty()
    return round(host_time(empty).median, 2)


def _speed(timing: Timing, copy: Timing, traffic: int) -> Row:
    return {
        "median_us": round(timing.median, 3),
        "min_us": round(timing.least, 3),
        "max_us": round(timing.most, 3),
        "rounds": len(timing.samples),
        "samples_us": [round(s, 3) for s in timing.samples],
        "gbps": round(traffic / timing.median / 1e3, 2),
        "of_copy": round(copy.median / timing.median, 4),
        "copy_gbps": round(traffic / copy.median / 1e3, 2),
        "traffic_bytes": traffic,
    }
