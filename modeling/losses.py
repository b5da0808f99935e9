"""Losses of the heads, in fp32 whatever the logits are."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy
from swathe.modeling.layers.linear import beside_weights
from swathe.modeling.masks import looked_at

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


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
    return token_loss(
        logits, shift_labels, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index
    )


def token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of every token with its own label: masked language models, token classes.

    Shapes: logits (B, T, V), labels (B, T). Rounding, mean and the case without labels as in
    causal_lm_loss. Raises ValueError where shapes do not fit and for a label that is neither
    `ignore_index` nor one of 0 to V - 1, which is searched for on a CPU, elsewhere under
    `swathe.debug()`.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)} and logits {tuple(logits.shape)}; labels need "
            f"{tuple(logits.shape[:-1])}, one a token (and logits_to_keep=0)"
        )
    wide, targets = _wide(logits.reshape(-1, logits.shape[-1])), labels.reshape(-1)
    return _cross_entropy(wide, targets.to(logits.device), num_items_in_batch, ignore_index)


def sequence_classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None
) -> Tensor:
    """The loss of one row of logits a sequence, by HF's three problem types.

    Shapes: logits (B, L). "regression": mean squared error, labels (B, L), or (B,) for one label.
    "single_label_classification": cross-entropy, whole labels (B,), -100 ignored.
    "multi_label_classification": binary cross-entropy of each label, labels (B, L) of 0 to 1.
    None is inferred anew at every call: regression for L = 1, single label for whole numbers, else
    multi-label. Rounding: logits are widened to fp32.
    Raises ValueError naming the problem type for labels that do not fit it.
    """
    B, L = logits.shape
    kind = problem_type if problem_type is not None else _inferred(labels, L)
    if kind not in get_args(ProblemType):
        raise ValueError(f"problem_type={kind!r}; allowed: {get_args(ProblemType)} or None")
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    single = kind == "single_label_classification"
    shapes = [(B,), (B, 1)] if single or (L == 1 and kind == "regression") else [(B, L)]
    if tuple(labels.shape) not in shapes or (single and not whole):
        source = "inferred from labels" if problem_type is None else "given"
        raise ValueError(
            f"problem_type={kind!r} ({source}) with num_labels={L}: labels are {labels.dtype} of "
            f"shape {tuple(labels.shape)}; they must be {'whole numbers' if single else 'numbers'} "
            f"of shape {shapes[0]}. Set config.problem_type to what the labels mean; for several "
            "labels a sequence they are floats, one a label"
        )
    wide, labels = _wide(logits), labels.to(logits.device)
    if single:
        return _cross_entropy(wide, labels.reshape(-1), None, -100)
    targets = labels.to(wide.dtype).view_as(wide)
    if kind == "regression":
        return F.mse_loss(wide, targets)
    return F.binary_cross_entropy_with_logits(wide, targets)


def question_answering_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> Tensor:
    """The mean of two cross-entropies over positions: where the answer starts, and where it ends.

    Shapes: logits (B, T), positions (B,) or (B, 1), whole numbers. As in HF a position past the
    last token is ignored and a negative one counts as 0; with none left the loss is 0.
    Raises ValueError for other shapes.
    """
    B, T = start_logits.shape
    losses = []
    for name, logits, positions in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        if tuple(positions.shape) not in ((B,), (B, 1)) or positions.is_floating_point():
            raise ValueError(
                f"{name} is {positions.dtype} of shape {tuple(positions.shape)}; it must hold "
                f"whole numbers of shape ({B},), one a sequence"
            )
        targets = positions.to(logits.device).view(B).clamp(0, T)
        losses.append(_cross_entropy(_wide(logits), targets, None, T))
    return (losses[0] + losses[1]) / 2


def _inferred(labels: Tensor, count: int) -> ProblemType:
    if count == 1:
        return "regression"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return "multi_label_classification"
    return "single_label_classification"


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(
    wide: Tensor, targets: Tensor, items: Tensor | int | None, ignore_index: int
) -> Tensor:
    """Of rows (N, V) at targets (N,): the mean over those not ignored, or the sum over `items`."""
    targets, counted, count = targets.long(), targets != ignore_index, wide.shape[-1]
    if looked_at(targets):
        outside = targets[counted & ((targets < 0) | (targets >= count))]
        if len(outside):
            raise ValueError(
                f"labels hold {int(outside[0])}, but there are {count} classes; labels must be 0 "
                f"to {count - 1}, or {ignore_index} to be ignored"
            )
    total = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")
    if items is None:
        return total / counted.sum().clamp(min=1)
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


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
    c tanh(z / c). The head must be an nn.Linear as torch runs it: an adapter, a hook or a patched
    forward would be passed over, so each raises UnsupportedFeature, naming what was found.
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


def plain_projection(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head that does nothing else than multiply and add them."""
    found = beside_weights(head)
    if found is not None:
        _refuse(f"the head {found}")
    return head.weight, head.bias


def _refuse(found: str) -> NoReturn:
    raise UnsupportedFeature(
        f"the fused loss reads the head's weight and never calls it, but {found}, which it would "
        "pass over. Merge or remove that, or set loss_implementation=None to form the logits"
    )
