"""Is a backend right on this device: the contract, reruns, graphs, streams, layouts, huge tensors.

`parity` gives rows with the contract's ratios; each check gives one row that says "ok" or what is
wrong. Everything runs with fresh memory poisoned (torch fills it with NaN), so that an output that
no kernel wrote shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES
from bench.subject import Subject, subject
from swathe.kernels.attention import paths
from swathe.kernels.core.contract import Case, Contract, Outputs, Problem, bound_of, check, measure
from swathe.kernels.core.testing import ContractBroken, Report

Row = dict[str, Any]
HUGE_BYTES = 32 << 30


@contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty is filled with NaN, except for a path that determinism forbids."""
    if os.environ.get(paths.VARIABLE) == "gluon_fused":
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def groups(contract: Contract) -> list[str]:
    """The groups of an op's cases, in their order."""
    found = (case.group for case in contract.cases(torch.float32, "cpu", 0))
    return list(dict.fromkeys(found))


def parity_on_edges(op: str, backend: str, device: str, dtype: str, group: str) -> list[Row]:
    """The contract over the edge shapes: a row for each output, and one that says what broke."""
    contract, found, error = subject(op).contract, None, None
    with poisoned():
        try:
            found = check(contract, backend, device=device, dtypes=[DTYPES[dtype]], groups=[group])
        except ContractBroken as broken:
            error = str(broken)
    return _rows(op, "edges", backend, dtype, found, error)


def parity_on(op: str, backend: str, device: str, dtype: str, shapes: list[str]) -> list[Row]:
    """The same measure over large shapes, whose inputs are drawn on the device itself."""
    of = subject(op)
    report = Report(f"{op} on {backend!r} ({device})")
    error = None
    with poisoned():
        for index, name in enumerate(shapes):
            form = of.forms[index % len(of.forms)]
            problem = of.draw(of.shape(name), DTYPES[dtype], form, device, index)
            measure(of.contract, report, Case("", problem), backend)
        try:
            report.settle(partial(bound_of, of.contract))
        except ContractBroken as broken:
            error = str(broken)
    return _rows(op, "large", backend, dtype, report, error)


def _rows(
    op: str, shapes: str, backend: str, dtype: str, report: Report | None, error: str | None
) -> list[Row]:
    facts = {"op": op, "shapes": shapes, "backend": backend, "dtype": dtype}
    ratios = [{**facts, **row} for row in (report.rows() if report else [])]
    return [*ratios, {**facts, "error": error}] if error else ratios


def drawn(of: Subject, device: str, shape: Any, seed: int, form: str | None = None) -> Problem:
    """A bf16 problem of the last form, the one with the most inputs, unless another is named."""
    chosen = of.forms[-1] if form is None else form
    return of.draw(shape, torch.bfloat16, chosen, device, seed)


def run_of(of: Subject, backend: str, problem: Problem) -> Callable[[], Outputs]:
    """Forward and backward of a backend on one problem, chosen once."""
    function = partial(of.contract.function, implementation=of.choose(problem, backend))
    return lambda: problem.run(function)


def different(a: Outputs, b: Outputs) -> list[str]:
    """Names of outputs that are not bitwise equal."""
    return [
        f"{name}: {int((a[name] != b[name]).sum())} of {a[name].numel()} elements differ"
        for name in a
        if not torch.equal(a[name], b[name])
    ]


def reruns(of: Subject, backend: str, device: str, shape: Any, dry: bool) -> str:
    """Bitwise the same results in a hundred reruns."""
    run = run_of(of, backend, drawn(of, device, shape, 1))
    first, times = run(), 4 if dry else 100
    for index in range(times):
        found = different(first, run())
        if found:
            return f"rerun {index + 1} of {times}: {'; '.join(found)}"
    return "ok"


def graph_replay(of: Subject, backend: str, device: str, shape: Any, dry: bool) -> str:
    """A captured forward and backward, replayed on other inputs, gives what a direct call gives."""
    held, fresh = drawn(of, device, shape, 2), drawn(of, device, shape, 3)
    run = run_of(of, backend, held)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for kept, new in zip(_tensors(held), _tensors(fresh), strict=True):
        kept.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    return "; ".join(different(outputs, run_of(of, backend, fresh)())) or "ok"


def _tensors(problem: Problem) -> list[Tensor]:
    values = (*problem.inputs.values(), *problem.arriving.values(), *problem.options.values())
    return [t.detach() for t in values if isinstance(t, Tensor)]


def other_stream(of: Subject, backend: str, device: str, shape: Any, dry: bool) -> str:
    """On a side stream the kernels wait for that stream: inputs are written there 25 ms late."""
    problem = drawn(of, device, shape, 4, of.forms[0])
    expected = run_of(of, backend, problem)()
    first = next(iter(problem.inputs.values()))
    kept = first.clone()
    first.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        first.copy_(kept)
        found = run_of(of, backend, problem)()
    torch.cuda.synchronize()
    return "; ".join(different(expected, found)) or "ok"


def layouts(of: Subject, backend: str, device: str, shape: Any, dry: bool) -> str:
    """Rows that lie apart and start at odd addresses give what contiguous rows give."""
    problem = drawn(of, device, shape, 5)
    expected = run_of(of, backend, problem)()
    apart = problem.map(lambda t: _apart(t) if t.dim() > 1 and t.is_floating_point() else t)
    return "; ".join(different(expected, run_of(of, backend, apart)())) or "ok"


def _apart(rows: Tensor) -> Tensor:
    wide = rows.new_full((*rows.shape[:-1], rows.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = rows
    return wide[..., 1:-2]


def compiled(of: Subject, backend: str, device: str, shape: Any, dry: bool) -> str:
    """torch.compile(fullgraph=True) around the public function changes no bit."""
    problem = drawn(of, device, shape, 6, of.forms[0])
    expected = run_of(of, backend, problem)()
    torch._dynamo.reset()
    function = torch.compile(of.contract.on(backend), fullgraph=True)
    return "; ".join(different(expected, problem.run(function))) or "ok"


CHECKS: dict[str, Callable[[Subject, str, str, Any, bool], str]] = {
    "100 reruns": reruns,
    "CUDA graph": graph_replay,
    "side stream": other_stream,
    "rows apart": layouts,
    "torch.compile": compiled,
}
NEED_A_GPU = frozenset({"CUDA graph", "side stream", "torch.compile"})
