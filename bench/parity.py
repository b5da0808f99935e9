"""Is a backend right on this device: the contract, reruns, graphs, streams, layouts, huge tensors.

`parity` gives rows with the contract's ratios; each check gives one row that says "ok" or what is
wrong. Everything runs with fresh memory poisoned (torch fills it with NaN), so that an output that
no kernel wrote shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, NAMED, Cell, Variant, draw
from bench.measure import call_on
from swathe.kernels.core.testing import BOUNDS, ContractBroken, Report
from swathe.kernels.norm.api import resolve_rms_norm, rms_norm
from swathe.kernels.norm.contract import EPS, Outputs, Problem, check_backend, measure
from swathe.kernels.norm.shapes import EDGES, Shape

Row = dict[str, Any]
FULL = Variant("add forward+backward", True, True)
PLAIN = Variant("forward+backward", True, False)
HUGE = (2**19 + 9, 4096)  # 2^31 elements and nine rows
HUGE_BYTES = 32 << 30


@contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def parity_on_edges(backend: str, device: str, dtype: str, casting: Any) -> list[Row]:
    """The public contract over the shapes that tests use."""
    found: Report | None = None
    error = None
    with poisoned():
        try:
            found = check_backend(
                backend, device=device, dtypes=(DTYPES[dtype],), castings=(casting,), shapes=EDGES
            )
        except ContractBroken as broken:
            error = str(broken)
    return _rows("edges", backend, dtype, casting, found, error)


def parity_on(
    backend: str, device: str, dtype: str, casting: Any, shapes: tuple[str, ...]
) -> list[Row]:
    """The same measure over large shapes, whose inputs are drawn on the device itself."""
    report = Report(f"rms_norm on {backend!r} ({device}), casting {casting}")
    error = None
    with poisoned():
        for index, name in enumerate(shapes):
            cell = Cell.of(NAMED[name], dtype, FULL if index % 2 else PLAIN)
            measure(report, draw(cell, device, index, casting), backend)
        try:
            report.settle(BOUNDS["row-wise"])
        except ContractBroken as broken:
            error = str(broken)
    return _rows("large", backend, dtype, casting, report, error)


def _rows(
    shapes: str, backend: str, dtype: str, casting: str, report: Report | None, error: str | None
) -> list[Row]:
    facts = {"op": "rms_norm", "shapes": shapes, "backend": backend, "dtype": dtype}
    facts["casting"] = casting
    ratios = [
        {**facts, **row, "output": str(row["output"]).split()[0]}
        for row in (report.rows() if report else [])
    ]
    return [*ratios, {**facts, "error": error}] if error else ratios


Run = Callable[[], Outputs]


def run_of(backend: str, problem: Problem) -> Run:
    """Forward and backward of a backend on one problem."""
    r = problem.residual
    choice = resolve_rms_norm(problem.x, problem.weight, backend, residual=r is not None)

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
        return rms_norm(x, weight, EPS, residual=residual, implementation=choice)

    return call_on(norm, problem, FULL if r is not None else PLAIN)


def different(a: Outputs, b: Outputs) -> list[str]:
    """Names of outputs that are not bitwise equal."""
    return [
        f"{name}: {int((a[name] != b[name]).sum())} of {a[name].numel()} elements differ"
        for name in a
        if not torch.equal(a[name], b[name])
    ]


def reruns(backend: str, device: str, shape: Shape, times: int) -> str:
    """Bitwise the same results in `times` reruns."""
    run = run_of(backend, draw(Cell.of(shape, "bfloat16", FULL), device, 1))
    first = run()
    for index in range(times):
        found = different(first, run())
        if found:
            return f"rerun {index + 1} of {times}: {'; '.join(found)}"
    return "ok"


def graph_replay(backend: str, device: str, shape: Shape) -> str:
    """A captured forward and backward, replayed on other inputs, gives what a direct call gives."""
    cell = Cell.of(shape, "bfloat16", FULL)
    held, fresh = draw(cell, device, 2), draw(cell, device, 3)
    run = run_of(backend, held)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for name in ("x", "residual", "weight", "dy", "dh"):
        getattr(held, name).detach().copy_(getattr(fresh, name))
    graph.replay()
    torch.cuda.synchronize()
    return "; ".join(different(outputs, run_of(backend, fresh)())) or "ok"


def other_stream(backend: str, device: str, shape: Shape) -> str:
    """On a side stream the kernels wait for that stream: x is written there 25 ms late."""
    problem = draw(Cell.of(shape, "bfloat16", PLAIN), device, 4)
    expected = run_of(backend, problem)()
    x = problem.x.clone()
    problem.x.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        problem.x.copy_(x)
        found = run_of(backend, problem)()
    torch.cuda.synchronize()
    return "; ".join(different(expected, found)) or "ok"


def layouts(backend: str, device: str, shape: Shape) -> str:
    """Rows that lie apart and start at odd addresses give what contiguous rows give."""
    problem = draw(Cell.of(shape, "bfloat16", FULL), device, 5)
    expected = run_of(backend, problem)()
    apart = {}
    for name in ("x", "residual", "dy", "dh"):
        rows = getattr(problem, name)
        wide = torch.full((shape.M, shape.N + 3), torch.nan, dtype=rows.dtype, device=device)
        wide[:, 1:-2] = rows
        apart[name] = wide[:, 1:-2]
    found = run_of(backend, Problem(weight=problem.weight, offset=0.0, casting="llama", **apart))()
    return "; ".join(different(expected, found)) or "ok"


def compiled(backend: str, device: str, shape: Shape) -> str:
    """torch.compile(fullgraph=True) around the public function changes no bit of y and dx."""
    problem = draw(Cell.of(shape, "bfloat16", PLAIN), device, 6)
    expected = run_of(backend, problem)()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
        return rms_norm(x, weight, EPS, implementation=backend)

    return "; ".join(different(expected, call_on(norm, problem, PLAIN)())) or "ok"


def huge(backend: str, device: str, rows: int, columns: int) -> str:
    """Past 2^31 elements: rows at both ends are those of a small call, dw is the fp64 sum."""
    generator = torch.Generator(device).manual_seed(7)
    x, dy = (
        torch.randn(rows, columns, dtype=torch.bfloat16, device=device, generator=generator)
        for _ in range(2)
    )
    weight = torch.randn(columns, dtype=torch.bfloat16, device=device, generator=generator)
    found = run_of(backend, Problem(x, weight, dy, None, None, 0.0, "llama"))()
    wrong = []
    for part in (slice(0, 8), slice(rows - 16, rows)):
        small = run_of(backend, Problem(x[part], weight, dy[part], None, None, 0.0, "llama"))()
        for name in ("y", "dx"):
            if not torch.equal(small[name], found[name][part]):
                wrong.append(f"{name} differs in rows {part.start} to {part.stop}")
    dw = torch.zeros(columns, dtype=torch.float64, device=device)
    for start in range(0, rows, 32768):
        h = x[start : start + 32768].double()
        h *= torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
        dw += (h * dy[start : start + 32768]).sum(0)
    error = ((found["dw"].double() - dw).norm() / dw.norm()).item()
    if not error < 4e-3:
        wrong.append(f"dw: relative error {error:.3g}, allowed 0.004")
    return "; ".join(wrong) or "ok"
