"""One cell measured: every contender checked against fp64, then timed beside the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from bench.cases import DTYPES, Cell, draw, gate, gold
from bench.contenders import PEER_ERRORS, Contender
from bench.subject import Subject
from bench.timing import (
    Call,
    Copy,
    Product,
    Replay,
    Timing,
    host_time,
    input_sets,
    peak_bytes,
    time_on_cpu,
    time_on_gpu,
)
from swathe.kernels.core.contract import Outputs, Problem

Row = dict[str, Any]
COPY, PRODUCT = "copy", "matrix product"
ROUNDS = {"cpu": 15, "cuda": 40}
# the columns of a row that holds a timing
_ROW_KEYS = {
    *("op", "shape", "size", "dtype", "variant", "backend", "ours", "median_us", "min_us"),
    *("max_us", "rounds", "samples_us", "gbps", "of_copy", "copy_gbps", "traffic_bytes"),
    *("host_us", "peak_mib"),
}
# and of an op that says how many flops it needs
_FLOP_KEYS = {"flops", "tflops", "of_product", "product_tflops"}


def row_keys(of: Subject) -> set[str]:
    """The columns of a row of this op that holds a timing."""
    return _ROW_KEYS | (_FLOP_KEYS if of.flops is not None else set())


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
    backward = cell.kind.backward
    problems = [draw(cell, device, seed)]
    traffic = cell.subject.traffic(problems[0], backward)
    problems += [draw(cell, device, seed + i) for i in range(1, input_sets(device, traffic))]
    truth = gold(cell, problems[0])
    calls: dict[str, list[Call]] = {}
    errors: dict[str, str] = {}
    present = [c for c in contenders if not c.absent]
    for contender in present:
        prepared = _prepared(contender, problems, backward, truth, DTYPES[cell.dtype])
        if isinstance(prepared, str):
            errors[contender.name] = prepared
        else:
            calls[contender.name] = prepared
    del truth
    peaks = {name: peak_bytes(each[0], device) for name, each in calls.items()}
    hosts = {
        c.name: _host(c, calls[c.name][0], problems[0], backward, device)
        for c in present
        if c.name in calls
    }
    calls[COPY] = Copy(traffic, device, len(problems)).calls()
    flops = cell.subject.flops(problems[0], backward) if cell.subject.flops else None
    product = Product(flops, DTYPES[cell.dtype], device) if flops else None
    if product is not None:
        calls[PRODUCT] = product.calls()
    timings = _timed(calls, errors, device, rounds or ROUNDS[device], seconds)
    rows = []
    for contender in present:
        row = {**cell.facts(), "backend": contender.name, "ours": contender.ours}
        if contender.name in errors:
            rows.append({**row, "error": errors[contender.name]})
            continue
        speed = _speed(timings[contender.name], timings[COPY], traffic)
        if flops and product is not None:
            ceiling = product.flops / timings[PRODUCT].median / 1e6
            speed |= _arithmetic(timings[contender.name], flops, ceiling)
        peak = round(peaks[contender.name] / 2**20, 3)
        rows.append({**row, **speed, "host_us": hosts[contender.name], "peak_mib": peak})
    return rows


def _prepared(
    contender: Contender,
    problems: list[Problem],
    backward: bool,
    truth: Outputs,
    dtype: torch.dtype,
) -> list[Call] | str:
    try:
        function = contender.prepare(problems[0])
        calls = [problem.call(function, backward=backward) for problem in problems]
        reason = gate(calls[0](), truth, dtype)
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


def _host(
    contender: Contender, call: Call, problem: Problem, backward: bool, device: str
) -> float | None:
    """Microseconds of Python a call; on a CPU those of a call on no rows.

    None on a CPU for torch.compile, which would compile once more for no rows, and for ops that
    need at least one.
    """
    if device == "cuda":
        return round(host_time(call).median, 2)
    if contender.name == "compile":
        return None
    rows = next(iter(problem.inputs.values())).shape[0]
    none = problem.map(lambda t: t[:0] if t.dim() > 1 and t.shape[0] == rows else t)
    try:
        empty = none.call(contender.prepare(none), backward=backward)
        empty()
    except PEER_ERRORS:
        return None
    return round(host_time(empty).median, 2)


def _arithmetic(timing: Timing, flops: int, ceiling: float) -> Row:
    tflops = flops / timing.median / 1e6
    return {
        "flops": flops,
        "tflops": float(f"{tflops:.4g}"),
        "of_product": round(tflops / ceiling, 4),
        "product_tflops": float(f"{ceiling:.4g}"),
    }


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
