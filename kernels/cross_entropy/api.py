"""cross_entropy: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module

from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend, triton_backend
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
from swathe.kernels.core.registry import (
    AUTO,
    Backend,
    Choice,
    Prefer,
    register_backend,
    set_preference,
)
from swathe.kernels.core.spec import ANY, FLOATS, Capabilities
from swathe.kernels.cross_entropy.op import fused

OP = "cross_entropy"

_chooser = Chooser(OP, "label_smoothing", "softcap", "logit_scale", "z_loss")


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    shift_labels: bool = False,
    num_items: Tensor | float | None = None,
    implementation: str | Choice = AUTO,
) -> Tensor:
    """Cross-entropy of `logits` (..., V) at `labels` (...), without a copy of the logits.

    Logits are scaled first and capped second: z = softcap * tanh(logit_scale * logits / softcap).
    Each row's loss is that of F.cross_entropy, plus z_loss * logsumexp(z)^2, which the returned
    loss includes. Rows labelled `ignore_index` contribute 0. "mean" divides by the other rows, or
    by `num_items` (HF's num_items_in_batch); without any such row the loss is 0.
    With `shift_labels`, position t is held to the label of t + 1 and the last one is ignored.

    The loss is fp32 (fp64 for fp64 logits on "eager"): () or, for reduction "none", labels' shape.
    dlogits is rounded once, to the dtype of the logits. Logits whose leading dimensions do not
    merge into one stride, such as logits[:, :-1], are copied: use shift_labels.
    A label outside [0, V) that is not ignore_index makes loss and gradient of its row NaN: it
    cannot be reported without stopping the device.

    Raises ValueError or TypeError for shapes, devices, dtypes and options that do not fit, before
    anything is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot
    serve. Second derivatives and forward-mode AD of fused backends raise.
    """
    check_labels(OP, "logits", logits, labels)
    check_reduction(OP, reduction, num_items)
    options = checked_options(OP, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    if shift_labels:
        labels = shifted(OP, labels, ignore_index)
    grad = wants_gradient(logits)
    facts = (logits.shape[-1], grad, *_features(options))
    call = _chooser.call_for(logits, implementation, *facts)
    return call(logits, labels, options, reduction, num_items)


def resolve_cross_entropy(
    logits: Tensor,
    implementation: str = AUTO,
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like `logits` (meta tensors will do).

    Raises as `cross_entropy` does for a backend that is unknown, unavailable or cannot serve.
    """
    options = checked_options(OP, -100, label_smoothing, softcap, logit_scale, z_loss)
    return _chooser.choose(logits, implementation, logits.shape[-1], grad, *_features(options))


def _features(options: LossOptions) -> tuple[bool, bool, bool, bool]:
    return options.smoothing != 0, options.softcap != 0, options.scale != 1, options.z_loss != 0


_EVERYTHING: dict[str, frozenset[Hashable] | str] = {
    "label_smoothing": ANY,
    "softcap": ANY,
    "logit_scale": ANY,
    "z_loss": ANY,
}

register_backend(eager_backend(OP, "swathe.kernels.cross_entropy.eager.cross_entropy", _EVERYTHING))
register_backend(
    Backend(
        OP,
        "torch",
        load=lambda: import_module("swathe.kernels.cross_entropy._torch").cross_entropy,
        capabilities=Capabilities(
            devices=frozenset({"cpu", "cuda", "meta"}),
            dtypes=FLOATS,
            features={"label_smoothing": ANY},
        ),
    )
)
register_backend(
    cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.cross_entropy._cpp"), _EVERYTHING)
)
register_backend(
    triton_backend(OP, lambda: fused("triton", "swathe.kernels.core.logits"), _EVERYTHING)
)
set_preference(
    OP,
    [
        Prefer(("triton", "eager"), device="cuda"),
        Prefer(("cpp", "eager"), device="cpu"),
        Prefer(("eager",)),
    ],
)
