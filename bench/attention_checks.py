"""What only attention can get wrong on a GPU: memory that grows as S^2, graphs, decode, caches.

Each check gives "ok", what is wrong, or "not run" and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.timing import peak_bytes
from swathe.kernels.attention.api import attention
from swathe.kernels.attention.contract import random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Case, Contract, Problem, bound_of, measure
from swathe.kernels.core.testing import ContractBroken, Report

NEEDS_A_GPU = "not run: needs a GPU"
DECODE = (
    Shape("one", 4, 16, 4, 1, 700, 128, 128),
    Shape("one_64", 6, 8, 8, 1, 1500, 64, 64),
    Shape("few", 3, 8, 2, 7, 900, 128, 128),
    Shape("most", 1, 8, 2, 64, 3000, 80, 80),
)


def decode(contract: Contract, backend: str, device: str, dry: bool) -> str:
    """The contract, for queries that no gradient is wanted of."""
    report = Report("decode")
    # eager rounds where the fused backends do not, so it reaches the bounds in fp32 alone
    only = backend == "eager"
    for dtype in (torch.float32,) if only else (torch.float32, torch.bfloat16, torch.float16):
        for index, shape in enumerate(DECODE):
            problem = random(shape, dtype, seed=index, device=device).given(causal=True)
            measure(contract, report, Case("decode", problem), backend, backward=False)
    try:
        report.settle(partial(bound_of, contract))
    except ContractBroken as broken:
        return str(broken)
    return "ok"


def one_graph(contract: Contract, backend: str, device: str, dry: bool) -> str:
    """A captured step of decode, replayed at other lengths, gives a direct call's bits."""
    if device != "cuda":
        return NEEDS_A_GPU
    shape = Shape("graph", 4, 16, 4, 1, 8192, 128, 128)
    q, k, v = random(shape, torch.bfloat16, seed=1, device=device).inputs.values()
    lengths = torch.full((shape.B,), 17, dtype=torch.int32, device=device)

    def step(held: Tensor) -> Tensor:
        with torch.no_grad():
            return attention(q, k, v, seq_lens=held, causal=True, implementation=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(lengths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(lengths)
    for these in ((1, 2, 3, 4), (17, 300, 8192, 1), (8192, 8191, 4097, 4096), (0, 5, 64, 1000)):
        lengths.copy_(lengths.new_tensor(these))
        graph.replay()
        if not torch.equal(o, step(lengths.clone())):
            return f"replayed at lengths {these}, it differs from a direct call"
    return "ok"


def memory(contract: Contract, backend: str, device: str, dry: bool) -> str:
    """Forward and backward of 32k tokens hold a small multiple of their inputs, never S^2."""
    if device != "cuda":
        return NEEDS_A_GPU
    peaks = []
    for S in (16_384, 32_768):
        shape = Shape("long", 1, 8, 8, S, S, 128, 128)
        problem = random(shape, torch.bfloat16, seed=1, device=device).given(causal=True)
        call = problem.call(contract.on(backend))
        call()  # compiled before it is measured
        peaks.append(peak_bytes(call, device))
    inputs = sum(t.numel() * t.element_size() for t in problem.inputs.values())
    if peaks[1] > 2.1 * peaks[0] or peaks[1] > 2 * inputs:
        held = " and ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks)
        return f"16k and 32k tokens take {held} beside inputs of {inputs / 2**20:.0f} MiB"
    return "ok"


def huge_cache(contract: Contract, backend: str, device: str, dry: bool) -> str:
    """A cache past 2^31 elements: sequences at both ends are what they are alone."""
    tokens = 40 if dry else 16_400
    shape = Shape("huge_cache", 129, 8, 8, 1, tokens, 128, 128)
    if dry:
        shape = shape._replace(B=5)
    elif device == "cuda" and torch.cuda.mem_get_info()[0] < 40 << 30:
        return f"not run: {torch.cuda.mem_get_info()[0] >> 30} GiB are free, 40 are needed"
    problem = random(shape, torch.bfloat16, seed=1, device=device)

    def rows(problem: Problem) -> dict[str, Tensor]:
        return problem.run(contract.on(backend), backward=False)

    found, wrong = rows(problem), []
    for part in (slice(0, 2), slice(shape.B - 2, shape.B)):
        alone = rows(problem.map(lambda t, p=part: t[p]))
        wrong += [
            f"{name} differs in sequences {part.start} to {part.stop}"
            for name, t in alone.items()
            if not torch.equal(t, found[name][part])
        ]
    return "; ".join(wrong) or "ok"


CHECKS: dict[str, Callable[[Contract, str, str, bool], str]] = {
    "decode": decode,
    "one graph for all lengths": one_graph,
    "memory of 32k tokens": memory,
    "cache past 2^31 elements": huge_cache,
}
