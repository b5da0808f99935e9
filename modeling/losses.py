"""Losses of the heads, in fp32 whatever the logits are."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each token's prediction of the next: HF's ForCausalLMLoss.

    Shapes: logits (B, T, V), labels (B, T); `shift_labels` are labels already moved by one.
    Rounding: logits are widened to fp32. The mean is over labels other than `ignore_index`, or the
    sum over `num_items_in_batch` (gradient accumulation). With no label left the loss is 0.
    Raises ValueError where shapes do not fit.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(shift_labels.shape)} and logits {tuple(logits.shape)}; labels need "
            f"{tuple(logits.shape[:-1])}, one a token (and logits_to_keep=0)"
        )
    targets = shift_labels.reshape(-1).to(logits.device)
    wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def linear_causal_lm_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    implementation: str | Choice = AUTO,
) -> Tensor:
    """`causal_lm_loss(head(hidden), labels)` whose logits never exist as a whole.

    Shapes: hidden (B, T, hidden_size); the rest as causal_lm_loss. `softcap` c turns logits z into
    c tanh(z / c). The head must be an nn.Linear as
    torch runs it: an adapter, a hook or a patched forward would be passed over, so each raises
    UnsupportedFeature, naming what was found.
    """
    weight, bias = plain_projection(head)
    targets = labels if shift_labels is None else shift_labels
    assert targets is not None
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(targets.shape)} and hidden states {tuple(hidden.shape)}; labels "
            f"need {tuple(hidden.shape[:-1])}, one a token"
        )
    return linear_cross_entropy(
        hidden,
        weight,
        targets.to(hidden.device),
        bias=bias,
        shift_labels=shift_labels is None,
        num_items=num_items_in_batch,
        softcap=softcap,
        ignore_index=ignore_index,
        implementation=implementation,
    )


def plain_projection(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head that does nothing else than multiply and add them."""
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        _refuse(f"the head is a {kind}, not a plain torch.nn.Linear")
    if "forward" in vars(head):
        _refuse("the head's forward was replaced on the instance")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name in hooks:
        if getattr(head, name):
            _refuse(f"the head has {name[1:].replace('_', ' ')}")
    if _has_any_global_hook():
        _refuse("hooks on all modules are registered with torch")
    return head.weight, head.bias


def _refuse(found: str) -> NoReturn:
    raise UnsupportedFeature(
        f"the fused loss reads the head's weight and never calls it, but {found}, which it would "
        "pass over. Merge or remove that, or set loss_implementation=None to form the logits"
    )
