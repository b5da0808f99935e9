"""How time is taken: interleaved rounds, cold caches on a GPU, host time, peak memory.

Contenders run in rounds, in an order that moves on by one every round, so that a change of clock
or a noisy neighbour falls on all of them. The copy of the same number of bytes is one of them, and
a matrix product where an op is bound by flops.

CPU      a sample is a loop of calls of at least SAMPLE seconds; caches are as the loop leaves them,
         and outputs are allocated by each call, as in a model (the copy writes to memory it has).
GPU      a sample is one replay of a CUDA graph of K calls, each on inputs of its own and writing
         to memory of its own, between two events, after L2 was flushed by reading FLUSH_BYTES (by
         reading, since lines left dirty would be written back at the contender's expense). The
         flush also runs longer than the host needs to enqueue the replay, so that no gap of the
         host is timed. Clocks are left as they are.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from swathe.kernels.core.contract import Outputs, Problem

Call = Callable[[], object]

SAMPLE = 1e-3  # seconds: what interrupts a loop, a tick or a clock read, is a thousandth of it
FLUSH_BYTES = 1 << 30
GRAPH_BYTES = 400e6  # traffic of one replay: about 100 us on the fastest card there is
MOST_SETS = 32
FEWEST = 5
# the profiler that counts memory on a CPU announces every start and stop on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Timing:
    """Microseconds a call over all rounds."""

    median: float
    least: float
    most: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Statistics of samples in microseconds."""
        return cls(statistics.median(samples), min(samples), max(samples), tuple(samples))


def input_sets(device: str, traffic: int) -> int:
    """How many sets of inputs a contender goes through in one sample."""
    if device == "cpu":
        return 1
    return max(1, min(MOST_SETS, math.ceil(GRAPH_BYTES / traffic)))


def interleave(
    samplers: dict[str, Callable[[], float]],
    rounds: int,
    before: Call | None = None,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """`rounds` samples of each, the order rotated by one each round; `before` runs before each.

    After FEWEST rounds it stops early where `seconds` have passed.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= FEWEST and time.perf_counter() - start > seconds:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before()
            samples[name].append(samplers[name]())
    return samples


def time_on_cpu(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, Timing]:
    """Microseconds a call of each contender, side by side; `seconds` as in `interleave`."""
    samplers = {}
    for name, call in calls.items():
        call()
        estimate = min(_seconds(call, 1) for _ in range(3))
        samplers[name] = _looped(call, max(1, min(2000, math.ceil(SAMPLE / estimate))))
    samples = interleave(samplers, rounds, seconds=seconds)
    return {name: Timing.of([1e6 * s for s in found]) for name, found in samples.items()}


def _looped(call: Call, count: int) -> Callable[[], float]:
    return lambda: _seconds(call, count) / count


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


class Backward:
    """The backward of a problem alone; `forward` makes the graph that all later calls go through.

    A call gives the gradient of every input by "d" + its name.
    """

    def __init__(self, problem: Problem, function: Callable[..., Any]) -> None:
        self.leaves = {k: t.detach().requires_grad_() for k, t in problem.inputs.items()}
        self.function, self.options = function, dict(problem.options)
        self.arriving = tuple(problem.arriving.values())
        self.outputs: tuple[Tensor, ...] | None = None

    def forward(self) -> None:
        """Call the function anew, on the current stream."""
        found = self.function(**self.leaves, **self.options)
        self.outputs = found if type(found) is tuple else (found,)

    def __call__(self) -> Outputs:
        if self.outputs is None:
            self.forward()
        assert self.outputs is not None
        leaves = tuple(self.leaves.values())
        found = torch.autograd.grad(self.outputs, leaves, self.arriving, retain_graph=True)
        return {f"d{name}": t for name, t in zip(self.leaves, found, strict=True)}


class Replay:
    """A CUDA graph of several calls; it keeps their outputs, so that no two write to one place."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.count = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # a backward runs on the stream of its forward, which has to be the captured one
            for call in calls:
                if isinstance(call, Backward):
                    call.forward()
            for call in (calls[0], calls[0], *calls):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.outputs = [call() for call in calls]

    def start(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue one replay between two events."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        return begin, end


class Flush:
    """Replaces what L2 holds, by reading random numbers."""

    def __init__(self) -> None:
        self.data = torch.rand(FLUSH_BYTES // 4, device="cuda")
        self.sink = torch.empty((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self.data, dim=0, out=self.sink)


def time_on_gpu(replays: dict[str, Replay], rounds: int) -> dict[str, Timing]:
    """Microseconds a call of each captured contender, side by side, from a cold L2."""
    flush = Flush()
    pending: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in replays}

    def enqueue(name: str) -> Callable[[], float]:
        def sample() -> float:
            pending[name].append(replays[name].start())
            return 0.0

        return sample

    samplers = {name: enqueue(name) for name in replays}
    interleave(samplers, 3, flush)
    torch.cuda.synchronize()
    for events in pending.values():
        events.clear()
    interleave(samplers, rounds, flush)
    torch.cuda.synchronize()
    return {
        name: Timing.of([1e3 * b.elapsed_time(e) / replays[name].count for b, e in events])
        for name, events in pending.items()
    }


def host_time(call: Call, *, calls: int = 30, batches: int = 5) -> Timing:
    """Microseconds until a call returns to Python; on a GPU its kernels are only enqueued then."""
    gpu = torch.cuda.is_available()
    samples = []
    for _ in range(batches):
        if gpu:
            torch.cuda.synchronize()
        samples.append(1e6 * _seconds(call, calls) / calls)
    if gpu:
        torch.cuda.synchronize()
    return Timing.of(samples)


def peak_bytes(call: Call, device: str) -> int:
    """Most memory that torch holds for one call at any time, beyond what it held before.

    On a CPU it is counted from torch's allocator, which scratch inside a library does not use.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as traced:
        kept = call()
    del kept
    # torch's stubs leave out nbytes()
    results: Any = traced.kineto_results  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


class Copy:
    """Copies that move as many bytes as an op does: half read, half written."""

    def __init__(self, traffic: int, device: str, sets: int) -> None:
        size = max(1, traffic // 2)
        self.pairs: list[tuple[Tensor, Tensor]] = [
            (
                torch.randint(0, 256, (size,), dtype=torch.uint8, device=device),
                torch.empty(size, dtype=torch.uint8, device=device),
            )
            for _ in range(sets)
        ]

    def calls(self) -> list[Call]:
        """One call for each pair of buffers."""
        return [partial(target.copy_, source) for source, target in self.pairs]


class Product:
    """A matrix product of about as many flops as an op needs, up to what keeps any GPU busy."""

    def __init__(self, flops: int, dtype: torch.dtype, device: str) -> None:
        most = 8192 if device == "cuda" else 512
        size = max(64, min(most, round((flops / 2) ** (1 / 3)) // 64 * 64))
        self.flops = 2 * size**3
        self.factors = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        self.result = torch.empty(size, size, dtype=dtype, device=device)

    def calls(self) -> list[Call]:
        """One call."""
        return [partial(torch.mm, *self.factors, out=self.result)]
