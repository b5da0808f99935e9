"""Cross-entropy in C++ (csrc/cross_entropy.cpp): tensors in, tensors out, no checks; for CPUs.

The formulas are those of eager.py. Every row is computed alike whatever the number of threads,
which are torch's.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from swathe.kernels.core.cpp import TYPE_CODES, call
from swathe.kernels.core.losses import empty_losses, one_stride
from swathe.kernels.core.rows import as_rows

# LossArguments of csrc/cross_entropy.cpp
_PACKED = Struct("=7Q8q4d")


def forward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, peak and log_sum of every row of `logits` (..., V); softcap 0 is none."""
    found = empty_losses(logits, labels)
    numbers = (smoothing, softcap, scale, z_loss)
    _run("forward", logits, labels, found, (0, 0), 0, ignore_index, numbers)
    return found


def backward(
    arriving: Tensor,
    logits: Tensor,
    labels: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> Tensor:
    """dlogits, in the shape and dtype of `logits`; `arriving` is () or one for each row."""
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format)
    arriving, stride = one_stride(arriving)
    # names for the copies, which must outlive the call
    statistics = (peak, peak.contiguous(), log_sum.contiguous())
    numbers = (smoothing, softcap, scale, z_loss)
    incoming = (arriving.data_ptr(), stride)
    _run("backward", logits, labels, statistics, incoming, dx.data_ptr(), ignore_index, numbers)
    return dx


def _run(
    way: str,
    logits: Tensor,
    labels: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    incoming: tuple[int, int],
    dx: int,
    ignore_index: int,
    numbers: tuple[float, float, float, float],
) -> None:
    M, V = labels.numel(), logits.shape[-1]
    if M == 0:
        return
    (x, x_stride), labels = as_rows(logits), labels.contiguous()
    losses, peak, log_sum = statistics
    arriving, arriving_stride = incoming
    packed = _PACKED.pack(
        x.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
        peak.data_ptr(),
        log_sum.data_ptr(),
        arriving,
        dx,
        TYPE_CODES[x.dtype],
        labels.dtype == torch.int64,
        x_stride,
        arriving_stride,
        M,
        V,
        ignore_index,
        torch.get_num_threads(),
        *numbers,
    )
    call(f"swathe_cross_entropy_{way}", packed)
