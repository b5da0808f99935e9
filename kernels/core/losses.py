"""What the cross-entropies share: their options, labels, reductions and the eager formula.

    z    = softcap * tanh(scale * x / softcap)          z = scale * x without a softcap
    loss = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse^2,  lse = logsumexp(z)

Rows whose label is ignore_index contribute 0 and are not counted. "mean" divides by the rows that
are counted, or by num_items; with none counted the loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.errors import did_you_mean

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
LABELS = (torch.int64, torch.int32)


class LossOptions(NamedTuple):
    """The numbers of a loss, in the order in which operators take them; softcap 0 is none."""

    ignore_index: int = -100
    smoothing: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0
    z_loss: float = 0.0


def checked_options(
    op: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
) -> LossOptions:
    """The options as one tuple; ValueError for any that makes no sense."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing={label_smoothing}; it must lie in [0, 1]")
    if softcap is not None and not 0 < softcap < inf:
        raise ValueError(f"{op}: softcap={softcap}; it must be a positive number, or None for none")
    if not -inf < logit_scale < inf:
        raise ValueError(f"{op}: logit_scale={logit_scale}; it must be a finite number")
    if not 0 <= z_loss < inf:
        raise ValueError(f"{op}: z_loss={z_loss}; it must be a finite number of zero or more")
    if not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"{op}: ignore_index={ignore_index}; it must fit in 32 bits")
    return LossOptions(ignore_index, label_smoothing, softcap or 0.0, logit_scale, z_loss)


def check_reduction(op: str, reduction: str, num_items: Tensor | float | None) -> None:
    """ValueError for an unknown reduction, or for num_items that nothing is divided by."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction={reduction!r}{did_you_mean(reduction, REDUCTIONS)}; allowed: "
            f"{REDUCTIONS}"
        )
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"{op}: num_items is the divisor of reduction='mean', but reduction={reduction!r}; "
            "leave num_items out"
        )
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(
            f"{op}: num_items has shape {tuple(num_items.shape)}; it must be one number"
        )


def check_labels(op: str, name: str, x: Tensor, labels: Tensor) -> None:
    """The last dimension of `x` aside, `labels` must have its shape; and its device."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; it needs a last dimension of one or more"
        )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{op}: {name} is {x.dtype}; it must be floating point: float16, bfloat16, float32, or "
            "float64 with implementation='eager'"
        )
    if labels.dtype not in LABELS:
        raise TypeError(f"{op}: labels are {labels.dtype}; they must be int64 or int32 indices")
    if labels.shape != x.shape[:-1] or labels.device != x.device:
        raise ValueError(
            f"{op}: labels are {tuple(labels.shape)} on {labels.device}; {name} of shape "
            f"{tuple(x.shape)} needs labels of {tuple(x.shape[:-1])} on {x.device}"
        )


def shifted(op: str, labels: Tensor, ignore_index: int) -> Tensor:
    """Position t takes the label of t + 1, the last one is ignored: only labels are copied."""
    if labels.dim() == 0:
        raise ValueError(f"{op}: shift_labels=True needs labels with a dimension of positions")
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def empty_losses(x: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss, peak and log_sum of the rows of x, in fp32 and labels' shape."""
    loss, peak, log_sum = (
        torch.empty(labels.shape, dtype=torch.float32, device=x.device) for _ in range(3)
    )
    return loss, peak, log_sum


def one_stride(arriving: Tensor) -> tuple[Tensor, int]:
    """The gradient that arrives at rows, () or one for each, and the stride between them."""
    # what `losses.sum()` sends back is one number expanded to every row: stride 0, no copy
    if arriving.dim() == 0 or not any(arriving.stride()):
        return arriving, 0
    flat = arriving.reshape(-1)
    return flat, flat.stride(0)


def divisor(labels: Tensor, ignore_index: int, num_items: Tensor | float | None) -> Tensor | float:
    """What "mean" divides by; at least 1, so that a batch without labels has loss 0, not NaN."""
    if num_items is None:
        return (labels != ignore_index).sum().clamp(min=1)
    if not isinstance(num_items, Tensor):
        return num_items
    num_items = num_items.reshape(())
    # a number on the CPU is read there: copying it would keep a CUDA graph from being captured
    return num_items if num_items.device.type == "cpu" else num_items.to(labels.device)


def reduced(
    losses: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    """`losses` of every row as the reduction asks."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / divisor(labels, ignore_index, num_items)


def eager_loss(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    """The formula in torch: HF's ForCausalLMLoss bit for bit where its options suffice.

    fp32 inside, fp64 for fp64 logits. Labels outside [0, V) make the loss NaN.
    """
    ignore_index, smoothing, softcap, scale, z_loss = options
    V = logits.shape[-1]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, V)
    shape, labels = labels.shape, labels.reshape(-1).long()
    if scale != 1.0:
        z = z * scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    counted = labels != ignore_index
    known = (labels >= 0) & (labels < V)
    # F.cross_entropy stops the device at a label that is out of range
    safe = torch.where(known, labels, ignore_index)
    poison = torch.where(counted & ~known, torch.nan, 1.0).to(z.dtype)

    def entropy(how: str) -> Tensor:
        return F.cross_entropy(
            z, safe, ignore_index=ignore_index, label_smoothing=smoothing, reduction=how
        )

    loss = _eager_reduction(entropy, z, z_loss, counted, poison, reduction, num_items)
    return loss.reshape(shape) if reduction == "none" else loss


def _eager_reduction(
    entropy: Callable[[str], Tensor],
    z: Tensor,
    z_loss: float,
    counted: Tensor,
    poison: Tensor,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    extra = z.new_zeros(())
    if z_loss:
        squares = torch.logsumexp(z, -1).square() * z_loss
        extra = torch.where(counted, squares, 0.0)
    if reduction == "none":
        return (entropy("none") + extra) * poison
    total = entropy("sum") if z_loss == 0.0 else (entropy("none") + extra).sum()
    count: Any = 1 if reduction == "sum" else num_items
    if count is None:
        count = counted.sum().clamp(min=1)
    elif isinstance(count, Tensor):
        count = count.reshape(()).to(z.device)
    return total / count * poison.prod()


def loss_sizes(
    logits: Tensor,
    arriving: Tensor,
    *,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    errors: Tensor | None = None,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The formulas of loss and dlogits on absolute values, for the contracts of both ops.

    `errors` are the sizes of what the logits were summed up from, by default themselves; what a
    logit is off by, p is off by relatively. `rounding` is added for every p but the label's.
    """
    z, slope = logits * logit_scale, torch.ones_like(logits)
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 + t * t
    off = (logits.abs() if errors is None else errors) * abs(logit_scale)
    lse = torch.logsumexp(z, -1, keepdim=True)
    counted, s = labels != ignore_index, label_smoothing
    index = labels.clamp(0, logits.shape[-1] - 1)[..., None]
    row = (1 - s) * (lse.abs() + off.gather(-1, index)) + s * (lse.abs() + off.mean(-1, True))
    row = row + off.amax(-1, True) + 2 * z_loss * lse.square()
    row = torch.where(counted, row[..., 0], 0.0)
    weight = arriving.abs()
    if reduction == "mean":
        weight = weight / divisor(labels, ignore_index, num_items)
    onehot = torch.zeros_like(z).scatter_(-1, index, 1.0)
    p = torch.exp(z - lse) * (1 + 2 * z_loss * lse.abs())
    dz = p * (1 + off + lse.abs()) + p * rounding * (1 - onehot)
    dz = dz + (s / z.shape[-1]) * (1 + rounding) + (1 - s) * onehot
    dx = dz * slope * abs(logit_scale) * torch.where(counted, weight, 0.0)[..., None]
    return reduced(row, labels, ignore_index, reduction, num_items), dx
