"""attention: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from swathe.kernels.attention.eager import attention_with_weights
from swathe.kernels.attention.mask import Mask
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.registry import (
    AUTO,
    Backend,
    Choice,
    Prefer,
    register_backend,
    set_preference,
)
from swathe.kernels.core.spec import ANY, FLOATS_AND_DOUBLE, Capabilities

__all__ = [
    "Mask",
    "attention",
    "attention_with_weights",
    "register_attention",
    "resolve_attention",
]

OP = "attention"

_chooser = Chooser(OP, "grouped", "dropout", "weights")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    implementation: str | Choice = AUTO,
) -> Tensor:
    """Softmax attention of T queries over S keys, each key and value head shared by H/K heads.

    Shapes: q (B, H, T, D), k (B, K, S, D), v (B, K, S, E), with any strides; o (B, T, H, E), so
    that `o.flatten(2)` is what the output projection takes. Views (B, H, T, D) of (B, T, H, D)
    memory, as projections give them, are read in place.
    `mask` is a Mask, a boolean tensor (True: visible) or a floating-point one (added to the
    scores), broadcastable to (B, H, T, S); `causal` hides later keys on top of it, the last query
    aligned with the last key. `scale` defaults to 1/sqrt(D). `dropout` applies whenever it is > 0.
    Rounding: "eager" as HF's Llama; "sdpa" as torch's kernels. Rows that see no key give 0. Under
    autocast q, k and v are first rounded to its dtype, as torch's own attention does.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    _validate(q, k, v, dropout)
    described = _describe(mask, causal, q, k)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    grouped = q.shape[1] > k.shape[1]
    call = _chooser.call_for(q, implementation, q.shape[-1], grad, grouped, dropout > 0, False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(q, k, v, described, scale, dropout)


def resolve_attention(
    x: Tensor,
    head_dim: int,
    implementation: str = AUTO,
    *,
    groups: int = 1,
    dropout: bool = False,
    weights: bool = False,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors of the device and dtype of `x` (meta will do).

    `groups` is H/K, `weights` asks for a backend that can also return the attention weights.
    Raises as `attention` does for a backend that is unknown, unavailable or cannot serve.
    """
    return _chooser.choose(x, implementation, head_dim, grad, groups > 1, dropout, weights)


def register_attention(
    name: str,
    function: Callable[..., Tensor],
    capabilities: Capabilities,
    *,
    replace_existing: bool = False,
) -> None:
    """Add a backend `function(q, k, v, mask, scale, dropout) -> o (B, T, H, E)`.

    It receives the whole `Mask` and so cannot lose padding; what it does not name in
    `capabilities.features` ("grouped", "dropout", "weights") is never asked of it.
    """
    backend = Backend(OP, name, load=lambda: function, capabilities=capabilities)
    register_backend(backend, replace=replace_existing)


def _describe(mask: Mask | Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Mask:
    if mask is None:
        return Mask(causal=causal, rows_may_be_empty=causal and q.shape[2] > k.shape[2])
    if isinstance(mask, Tensor):
        if mask.dim() <= 4:
            mask = mask.expand(*[1] * (4 - mask.dim()), *mask.shape)
        if mask.dtype == torch.bool:
            mask = Mask(allowed=mask)
        elif mask.is_floating_point():
            mask = Mask(bias=mask)
        else:
            raise TypeError(
                f"attention: mask is {mask.dtype}; it must be bool (True: visible) or floating "
                "point (added to the scores). Use mask.bool() for a mask of 0 and 1"
            )
    if not mask.trivial:
        _check_parts(mask, q, k.shape[2])
    return mask.with_causal() if causal else mask


def _check_parts(mask: Mask, q: Tensor, S: int) -> None:
    B, H, T, _ = q.shape
    rows, full = ((B,), (B, T)), ((B, H, T, S),)
    for name, part, shapes in (
        ("start", mask.start, rows),
        ("end", mask.end, rows),
        ("keys", mask.keys, ((B, S),)),
        ("allowed", mask.allowed, full),
        ("bias", mask.bias, full),
    ):
        if part is not None and (
            part.device != q.device or not any(_broadcasts(part.shape, s) for s in shapes)
        ):
            raise ValueError(
                f"attention: mask ({name}) is {tuple(part.shape)} on {part.device}; it must "
                f"broadcast to {' or '.join(map(str, shapes))} on {q.device}, from q (B, H, T, D) "
                f"= {tuple(q.shape)} and {S} keys"
            )


def _broadcasts(shape: torch.Size, to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(
        have in (1, want) for have, want in zip(shape, to, strict=True)
    )


def _validate(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)};"
            " each needs four dimensions (batch, heads, tokens, head size)"
        )
    B, H, _, D = q.shape
    K = k.shape[1]
    if k.shape[0] != B or k.shape[3] != D or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; needs q "
            "(B, H, T, D), k (B, K, S, D), v (B, K, S, E) with equal B, D, K and S"
        )
    if K == 0 or H % K:
        raise ValueError(
            f"attention: q has {H} heads and k has {K}; the number of query heads must be a "
            "multiple of the number of key and value heads"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise TypeError(
            f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one "
            "floating-point dtype"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(
            f"attention: q is on {q.device}, k on {k.device}, v on {v.device}; move them together"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout={dropout}; it must be at least 0 and below 1")


def _backend(name: str, features: tuple[str, ...]) -> Backend:
    module = f"swathe.kernels.attention.{name}"
    return Backend(
        OP,
        name,
        load=lambda: import_module(module).attention,
        capabilities=Capabilities(
            devices=frozenset({"cpu", "cuda", "meta"}),
            dtypes=FLOATS_AND_DOUBLE,
            features=dict.fromkeys(features, ANY),
            # torch's fused backward accumulates dq in the order in which blocks finish
            deterministic=name == "eager",
        ),
    )


register_backend(_backend("eager", ("grouped", "dropout", "weights")))
register_backend(_backend("sdpa", ("grouped", "dropout")))
set_preference(OP, [Prefer(("sdpa", "eager"))])
