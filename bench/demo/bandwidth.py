"""How fast this machine reads memory: the limit of decoding one token at a time.

A model's weights are read once for each token of one sequence, and hardly anything else is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

BYTES = 256 << 20  # far beyond any cache, and no more than a small model's weights
ROUNDS = 7


def read_gbps(device: str) -> float:
    """GB/s of the fastest way to read BYTES once: torch's sum, its maximum, or a product.

    Medians of ROUNDS, in turn.
    """
    each = reading(device, BYTES)
    seconds: list[list[float]] = [[] for _ in each]
    for _ in range(ROUNDS + 1):
        for way, taken in zip(each, seconds, strict=True):
            taken.append(_seconds(way, device))
    # the first round warms up
    return BYTES / min(statistics.median(taken[1:]) for taken in seconds) / 1e9


def reading(device: str, size: int) -> list[Callable[[], Tensor]]:
    """Ways to read `size` bytes once."""
    matrix = torch.randn(size // 4 // 4096, 4096, device=device)
    vector = torch.randn(4096, device=device)
    return [matrix.sum, matrix.max, lambda: matrix @ vector]


def _seconds(way: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    way()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bytes_a_token(model: nn.Module) -> int:
    """Bytes of the weights that decoding a token reads: all but an embedding's other rows.

    An embedding that is also the head is read whole.
    """
    looked_up = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    read = [p for p in model.parameters() if p not in looked_up or p in multiplied]
    return sum(p.numel() * p.element_size() for p in read)
