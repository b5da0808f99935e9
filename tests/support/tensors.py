"""Where ops are tested, and random tensors to test them with."""

from __future__ import annotations

import torch
from torch import Tensor

from swathe.kernels.catalog import backends
from swathe.kernels.core import cpp
from swathe.kernels.core.registry import registered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def spread(t: Tensor, gap: int, skip: int) -> Tensor:
    """The same rows (M, N), `gap` and `skip` numbers apart, the first `skip` in: NaN between."""
    M, N = t.shape
    wide = t.new_full((M, N + gap + skip), torch.nan)
    wide[:, skip : skip + N] = t
    return wide[:, skip : skip + N]


def instruction_sets() -> list[str]:
    """Those of the C++ library that this processor runs, narrowest first."""
    if cpp.why_unavailable():
        return []
    return list(cpp.ISAS[: cpp.ISAS.index(cpp.isa()) + 1])


def fused_backends(op: str = "rms_norm") -> list[str]:
    """The op's fused backends that run on the device under test."""
    found = backends(op)[op]
    records = registered(op)
    names = [n for n in ("triton", "cpp") if n in found]
    return [n for n in names if DEVICE in records[n].capabilities.devices]
