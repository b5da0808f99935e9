"""One cell measured: every contender checked against fp64, then timed beside the others."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config

from bench.cases import DTYPES, Cell, draw, gate, gold
from bench.contenders import PEER_ERRORS, Contender
from bench.sittings import expected
from bench.subject import Function, Subject, Variant
from bench.timing import (
    Backward,
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
# of each cell: sittings, and rounds of a sitting
SITTINGS = {"cpu": 5, "cuda": 4}
ROUNDS = {"cpu": 7, "cuda": 10}
# the columns of a row that holds a timing
_ROW_KEYS = {
    *("op", "shape", "size", "dtype", "variant", "backend", "ours", "median_us", "min_us"),
    *("max_us", "rounds", "samples_us", "gbps", "of_copy", "copy_gbps", "traffic_bytes"),
    *("sittings_us", "band_us", "first_ms", "host_us", "peak_mib"),
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
    sittings: int = 1,
    rounds: int | None = None,
    seconds: float = math.inf,
    seed: int = 0,
) -> list[Row]:
    """One row for each contender that is present: its timing, or the error that kept it out.

    `rounds` of each of `sittings`; on a CPU those of a sitting stop early after `seconds`. A
    contender whose outputs are off from fp64 gets no timing, only the reason.
    """
    measured = Measured(cell, device, contenders, seed=seed)
    for _ in range(sittings):
        measured.sit(rounds or ROUNDS[device], seconds)
    return measured.rows()


def call_of(kind: Variant, function: Function, problem: Problem) -> Call:
    """What is timed: a call that gives outputs, gradients or both by name."""
    if kind.alone:
        return Backward(problem, function)
    return problem.call(function, backward=kind.backward)


class Measured:
    """A cell whose contenders are checked and warm, and are timed in one sitting or more.

    A sitting allocates its inputs anew: what depends on where memory lies, or on the machine's mood
    in a minute, differs from one to the next as it does from one run to another. So sittings that
    lie apart show how far a run's median is to be trusted, which rounds of one sitting do not.
    """

    def __init__(
        self, cell: Cell, device: str, contenders: Iterable[Contender], *, seed: int = 0
    ) -> None:
        self.cell, self.device, self.seed = cell, device, seed
        first = draw(cell, device, seed)
        kind, subject = cell.kind, cell.subject
        self.traffic = kind.of(subject.traffic, first)
        self.flops = kind.of(subject.flops, first) if subject.flops else None
        self.problems = [first]
        self.present = [c for c in contenders if not c.absent]
        self.functions: dict[str, Function] = {}
        self.errors: dict[str, str] = {}
        self.facts: dict[str, Row] = {}
        self.sittings: list[dict[str, Timing]] = []
        self.product_flops = 0
        truth = gold(cell, first)
        for contender in self.present:
            self._prepare(contender, truth)

    def _prepare(self, contender: Contender, truth: Outputs) -> None:
        name, problem, start = contender.name, self.problems[0], time.perf_counter()
        try:
            with _retained(self.cell.kind):
                function = contender.prepare(problem)
                call = call_of(self.cell.kind, function, problem)
                found: Any = call()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                first = time.perf_counter() - start
                reason = gate(found, truth, DTYPES[self.cell.dtype])
        except PEER_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"[:2000]
            self.errors[name] = reason
            return
        if reason:
            self.errors[name] = f"gate: {reason}"
            return
        del found
        self.functions[name] = function
        self.facts[name] = {
            "first_ms": round(1e3 * first, 3),
            "peak_mib": round(peak_bytes(call, self.device) / 2**20, 3),
            "host_us": self._host(contender, call),
        }

    def _host(self, contender: Contender, call: Call) -> float | None:
        """Microseconds of Python a call; on a CPU those of a call on no rows.

        None on a CPU for torch.compile, which would compile once more for no rows, and for ops that
        need at least one.
        """
        if self.device == "cuda":
            return round(host_time(call).median, 2)
        if contender.name == "compile":
            return None
        problem = self.problems[0]
        rows = next(iter(problem.inputs.values())).shape[0]
        none = problem.map(lambda t: t[:0] if t.dim() > 1 and t.shape[0] == rows else t)
        try:
            empty = call_of(self.cell.kind, contender.prepare(none), none)
            empty()
        except PEER_ERRORS:
            return None
        return round(host_time(empty).median, 2)

    def sit(self, rounds: int, seconds: float = math.inf) -> None:
        """Time every contender side by side, on inputs of this sitting."""
        # the first inputs are those that the contenders were checked on
        sets = input_sets(self.device, self.traffic)
        new = range(sets - len(self.problems))
        problems = self.problems + [draw(self.cell, self.device, self.seed) for _ in new]
        self.problems = []
        calls = {
            name: [call_of(self.cell.kind, function, problem) for problem in problems]
            for name, function in self.functions.items()
        }
        calls[COPY] = Copy(self.traffic, self.device, sets).calls()
        if self.flops:
            product = Product(self.flops, DTYPES[self.cell.dtype], self.device)
            self.product_flops, calls[PRODUCT] = product.flops, product.calls()
        with _retained(self.cell.kind):
            self.sittings.append(self._timed(calls, rounds, seconds))

    def _timed(
        self, calls: dict[str, list[Call]], rounds: int, seconds: float
    ) -> dict[str, Timing]:
        if self.device == "cpu":
            return time_on_cpu({name: each[0] for name, each in calls.items()}, rounds, seconds)
        replays = {}
        for name, each in calls.items():
            try:
                replays[name] = Replay(each)
            except PEER_ERRORS as error:
                self.errors[name] = f"CUDA graph capture: {type(error).__name__}: {error}"[:2000]
                self.functions.pop(name, None)
        return time_on_gpu(replays, rounds)

    def rows(self) -> list[Row]:
        """What was found so far: of a contender that failed the error, of others their timing."""
        rows = []
        for contender in self.present:
            name = contender.name
            row = {**self.cell.facts(), "backend": name, "ours": contender.ours}
            if name in self.errors:
                rows.append({**row, "error": self.errors[name]})
                continue
            timing, copy = self._timing(name), self._timing(COPY)
            speed = _speed(timing, copy, self.traffic)
            medians = [sitting[name].median for sitting in self.sittings]
            speed["sittings_us"] = [round(median, 3) for median in medians]
            band = expected(medians)
            speed["band_us"] = None if band is None else [round(end, 3) for end in band]
            if self.flops:
                ceiling = self.product_flops / self._timing(PRODUCT).median / 1e6
                speed |= _arithmetic(timing, self.flops, ceiling)
            rows.append({**row, **speed, **self.facts[name]})
        return rows

    def _timing(self, name: str) -> Timing:
        return Timing.of([s for sitting in self.sittings for s in sitting[name].samples])


def _retained(kind: Variant) -> AbstractContextManager[Any]:
    """For a backward alone, which goes through one graph many times: what torch.compile may keep.

    It otherwise overwrites what the forward kept, and refuses a second backward.
    """
    if not kind.alone:
        return nullcontext()
    return torch._functorch.config.patch(donated_buffer=False)


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
