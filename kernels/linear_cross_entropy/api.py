"""linear_cross_entropy: the public function, its backends, and the only check of its arguments."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from swathe.kernels.core.backends import eager_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.losses import (
    LossOptions,
    Reduction,
    check_labels,
    check_reduction,
    checked_options,
    shifted,
)
from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import AUTO, Choice, Prefer, register_backend, set_preference
from swathe.kernels.core.spec import ANY
from swathe.kernels.linear_cross_entropy.op import autocast_dtype, fused

OP = "linear_cross_entropy"

_chooser = Chooser(OP, "bias", "label_smoothing", "softcap", "logit_scale", "z_loss")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    shift_labels: bool = False,
    num_items: Tensor | float | None = None,
    chunk_rows: int | None = None,
    implementation: str | Choice = AUTO,
) -> Tensor:
    """Cross-entropy of hidden @ weight.T + bias at `labels`; the logits never exist as a whole.

    Shapes: hidden (..., K), weight (V, K), bias (V,), labels (...).
    Logits are scaled first and capped second: z = softcap * tanh(logit_scale * logits / softcap).
    Each row's loss is that of F.cross_entropy, plus z_loss * logsumexp(z)^2, which the returned
    loss includes. Rows labelled `ignore_index` contribute 0. "mean" divides by the other rows, or
    by `num_items` (HF's num_items_in_batch); without any such row the loss is 0.
    With `shift_labels`, position t is held to the label of t + 1 and the last one is ignored.
    `chunk_rows` rows of logits exist at a time; by default 1024 to 4096 of them, see _triton.py.

    The loss is fp32 (fp64 for fp64 input on "eager"): () or, for reduction "none", labels' shape.
    Fused backends keep logits in fp32; "eager" rounds them to hidden's dtype, as HF does. Gradients
    are rounded once, and only those of tensors that need one are computed: a frozen weight costs
    nothing. For "mean" and "sum" they are made in the forward.
    A label outside [0, V) that is not ignore_index makes the loss NaN, and gradients with it.

    Raises ValueError or TypeError for shapes, devices, dtypes and options that do not fit, before
    anything is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot
    serve. Second derivatives and forward-mode AD of fused backends raise.
    """
    _validate(hidden, weight, bias, labels, chunk_rows)
    check_reduction(OP, reduction, num_items)
    options = checked_options(OP, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    if shift_labels:
        labels = shifted(OP, labels, ignore_index)
    grad = wants_gradient(hidden, weight, bias)
    facts = (weight.shape[0], grad, *_features(bias is not None, options))
    call = _chooser.call_for(hidden, implementation, *facts)
    return call(hidden, weight, bias, labels, options, reduction, num_items, chunk_rows)


def resolve_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    implementation: str = AUTO,
    *,
    bias: bool = False,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like these (meta tensors will do).

    Raises as `linear_cross_entropy` does for a backend that is unknown, unavailable or cannot
    serve.
    """
    options = checked_options(OP, -100, label_smoothing, softcap, logit_scale, z_loss)
    facts = (weight.shape[0], grad, *_features(bias, options))
    return _chooser.choose(hidden, implementation, *facts)


def _features(bias: bool, o: LossOptions) -> tuple[bool, bool, bool, bool, bool]:
    return bias, o.smoothing != 0, o.softcap != 0, o.scale != 1, o.z_loss != 0


def _validate(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int | None
) -> None:
    check_labels(OP, "hidden", hidden, labels)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{OP}: weight is {tuple(weight.shape)}; hidden of shape {tuple(hidden.shape)} needs "
            f"a weight of (classes, {hidden.shape[-1]}), with one or more classes"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: bias is {tuple(bias.shape)}; a weight of {tuple(weight.shape)} needs a bias of "
            f"({weight.shape[0]},)"
        )
    mixed = autocast_dtype(hidden) is None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != hidden.device:
            raise ValueError(
                f"{OP}: {name} is on {t.device} and hidden on {hidden.device}; move one"
            )
        if not t.dtype.is_floating_point or (mixed and t.dtype != hidden.dtype):
            raise TypeError(
                f"{OP}: {name} is {t.dtype} and hidden is {hidden.dtype}; both must have one "
                "dtype, as in torch's linear: cast one of them, or use torch.autocast"
            )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{OP}: chunk_rows={chunk_rows}; it must be 1 or more, or None")


_EVERYTHING: dict[str, frozenset[Hashable] | str] = {
    "bias": ANY,
    "label_smoothing": ANY,
    "softcap": ANY,
    "logit_scale": ANY,
    "z_loss": ANY,
}

register_backend(
    eager_backend(OP, "swathe.kernels.linear_cross_entropy.eager.linear_cross_entropy", _EVERYTHING)
)
register_backend(
    triton_backend(
        OP, lambda: fused("triton", "swathe.kernels.linear_cross_entropy._triton"), _EVERYTHING
    )
)
set_preference(OP, [Prefer(("triton", "eager"), device="cuda"), Prefer(("eager",))])
