"""Where ops are tested, and random tensors to test them with."""

from __future__ import annotations

import torch
from torch import Tensor

import swathe.kernels.norm.api  # noqa: F401  (registers the backends)
from swathe.kernels.core.registry import registered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def fused_backends() -> list[str]:
    """The norm's fused backends that run on the device under test."""
    records = registered("rms_norm")
    return [n for n in ("triton", "cpp") if DEVICE in records[n].capabilities.devices]
