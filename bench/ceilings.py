"""What the machine can do at most, measured beside the models: reading, copying, multiplying."""

from __future__ import annotations

import torch

from bench.cases import DTYPES
from bench.demo.bandwidth import BYTES, reading
from bench.timing import Call, Copy, Product, Replay, Timing, time_on_cpu, time_on_gpu

ROUNDS = 9
PRODUCT_FLOPS = 2 * 8192**3
TINY_BYTES = 1 << 20


def ceilings(device: str, dtype: str, *, dry: bool = False) -> dict[str, float]:
    """GB/s of the fastest way to read, GB/s of a copy (both ways), TFLOP/s of a product."""
    size = TINY_BYTES if dry else BYTES
    product = Product(1 if dry else PRODUCT_FLOPS, DTYPES[dtype], device)
    calls: dict[str, list[Call]] = {
        "copy": Copy(2 * size, device, 1).calls(),
        "product": product.calls(),
        **{f"read {i}": [way] for i, way in enumerate(reading(device, size))},
    }
    timings = _timed(calls, device, 2 if dry else ROUNDS)
    read = min(timing.median for name, timing in timings.items() if name.startswith("read"))
    del calls
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "read_gbps": float(f"{size / read / 1e3:.4g}"),
        "copy_gbps": float(f"{2 * size / timings['copy'].median / 1e3:.4g}"),
        "product_tflops": float(f"{product.flops / timings['product'].median / 1e6:.4g}"),
    }


def _timed(calls: dict[str, list[Call]], device: str, rounds: int) -> dict[str, Timing]:
    if device == "cpu":
        return time_on_cpu({name: each[0] for name, each in calls.items()}, rounds, float("inf"))
    return time_on_gpu({name: Replay(each) for name, each in calls.items()}, rounds)
