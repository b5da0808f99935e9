"""attention: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Literal, overload

import torch
from torch import Tensor

from swathe.kernels.attention.eager import attention_with_weights
from swathe.kernels.attention.mask import Mask
from swathe.kernels.attention.op import fused
from swathe.kernels.attention.spec import FEATURES, AttentionSpec
from swathe.kernels.attention.validation import describe, placed, validate, validate_scores
from swathe.kernels.core.backends import cpp_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.launch import why_no_triton
from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import (
    AUTO,
    Backend,
    Choice,
    Prefer,
    register_backend,
    set_preference,
)
from swathe.kernels.core.spec import ANY, FLOATS_AND_DOUBLE, Capabilities, Spec

__all__ = [
    "AttentionSpec",
    "Mask",
    "attention",
    "attention_with_weights",
    "register_attention",
    "resolve_attention",
]

OP = "attention"

_chooser = Chooser(OP, "grouped", "dropout", "weights", "alibi_gradient", *FEATURES)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = ...,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    dropout: float = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    sinks: Tensor | None = ...,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = ...,
    seq_lens: Tensor | None = ...,
    block_table: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | Choice = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = ...,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    dropout: float = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    sinks: Tensor | None = ...,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = ...,
    seq_lens: Tensor | None = ...,
    block_table: Tensor | None = ...,
    return_lse: Literal[True],
    implementation: str | Choice = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | Choice = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of T queries over S keys, each key and value head shared by H/K heads.

    Shapes: q (B, H, T, D), k (B, K, S, D), v (B, K, S, E), with any strides; o (B, T, H, E), so
    that `o.flatten(2)` is what the output projection takes. Views (B, H, T, D) of (B, T, H, D)
    memory, as projections give them, are read in place.
    `mask` is a Mask, a boolean tensor (True: visible) or a floating-point one (added to the
    scores), broadcastable to (B, H, T, S); `causal` hides later keys on top of it, the last query
    aligned with the last key. `scale` defaults to 1/sqrt(D). `dropout` applies whenever it is > 0.
    `softcap` (Gemma2), `alibi` slopes (H,) or (B, H), and `sinks` (H,) (gpt-oss) change the scores
    as spec.py says; with `return_lse` the result is (o, lse), lse (B, H, T) in fp32.
    Packed documents: B = 1 and `cu_seqlens`, int (documents + 1,), their borders in the row; a pair
    gives queries and keys borders of their own.
    Caches: `seq_lens`, int (B,) on the device, says how many of the S keys each sequence holds; its
    T queries are the last of them. With `block_table`, int (B, pages), k is (P, K, page, D) and v
    (P, K, page, E), and S = pages * page. Keys past seq_lens and pages past the last one used may
    hold anything. Values in tables and lengths are looked at under `swathe.debug()` only.
    Rounding: "eager" as HF's Llama; "sdpa" as torch's kernels. Rows that see no key give 0. Under
    autocast q, k and v are first rounded to its dtype, as torch's own attention does.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    validate(q, k, v, dropout, block_table)
    validate_scores(q, softcap, alibi, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    described = describe(mask, causal, q, S)
    if cu_seqlens is not None or seq_lens is not None or block_table is not None:
        described = placed(described, q, k, S, cu_seqlens, seq_lens, block_table)
    spec = AttentionSpec(described, scale, dropout, softcap, alibi, sinks, return_lse, block_table)
    grad = wants_gradient(q, k, v, sinks, described.bias)
    learned = wants_gradient(alibi)
    asked = (q.shape[1] > k.shape[1], dropout > 0, False, learned, *spec.features)
    size = max(q.shape[-1], v.shape[-1])
    call = _chooser.call_for(q, implementation, size, grad or learned, *asked)
    return call(q, k, v, spec)


def resolve_attention(
    x: Tensor,
    head_dim: int,
    implementation: str = AUTO,
    *,
    groups: int = 1,
    dropout: bool = False,
    weights: bool = False,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    lse: bool = False,
    paged: bool = False,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors of the device and dtype of `x` (meta will do).

    `groups` is H/K, `weights` asks for a backend that can also return the attention weights, the
    others for what calls will be given.
    Raises as `attention` does for a backend that is unknown, unavailable or cannot serve.
    """
    asked = (groups > 1, dropout, weights, False, softcap, alibi, sinks, lse, paged)
    return _chooser.choose(x, implementation, head_dim, grad, *asked)


def register_attention(
    name: str,
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    capabilities: Capabilities,
    *,
    replace_existing: bool = False,
) -> None:
    """Add a backend `function(q, k, v, spec) -> o (B, T, H, E)`, or (o, lse) where spec.lse.

    It receives the whole AttentionSpec and so cannot lose padding; what it does not name in
    `capabilities.features` ("grouped", "dropout", "weights", "alibi_gradient" for slopes that
    learn, "softcap", "alibi", "sinks", "lse", "paged") is never asked of it.
    """
    backend = Backend(OP, name, load=lambda: function, capabilities=capabilities)
    register_backend(backend, replace=replace_existing)


def _limits_of_pages(spec: Spec) -> list[str]:
    """Caches in pages are read by a kernel for inference."""
    if ("paged", True) not in spec.features:
        return []
    reasons = ["a cache in pages (block_table) has no gradient; call it under torch.no_grad()"]
    dropped = ["a cache in pages (block_table) has no dropout"]
    return (reasons if spec.grad else []) + (dropped if ("dropout", True) in spec.features else [])


def _limits_of_hopper(spec: Spec) -> list[str]:
    """Kernels written for one generation of matrix units."""
    if spec.device != "cuda" or (spec.arch is not None and spec.arch < 100):
        return []
    given = "this one" if spec.arch is None else f"sm_{spec.arch}"
    return [f"is written for NVIDIA's sm_90, not for {given}; backend 'triton' serves that"]


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


register_backend(_backend("eager", ("grouped", "dropout", "weights", "alibi_gradient", *FEATURES)))
register_backend(_backend("sdpa", ("grouped", "dropout", "alibi_gradient")))
_triton = triton_backend(
    OP,
    lambda: fused("triton", "swathe.kernels.attention._triton"),
    dict.fromkeys(("grouped", "dropout", *FEATURES), ANY),
    max_size=256,
)
register_backend(replace(_triton, limits=_limits_of_pages))
register_backend(
    Backend(
        OP,
        "gluon",
        load=lambda: fused("gluon", "swathe.kernels.attention._gluon_sm90"),
        capabilities=Capabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.bfloat16, torch.float16}),
            features=dict.fromkeys(("grouped", *FEATURES), ANY),
            min_arch=90,
            max_size=576,
        ),
        missing=why_no_triton,
        limits=lambda spec: [*_limits_of_hopper(spec), *_limits_of_pages(spec)],
    )
)
_cpp = cpp_backend(
    OP,
    lambda: fused("cpp", "swathe.kernels.attention._cpp"),
    dict.fromkeys(("grouped", *FEATURES), ANY),
)
register_backend(replace(_cpp, limits=_limits_of_pages))
set_preference(OP, [Prefer(("cpp", "sdpa", "eager"), device="cpu"), Prefer(("sdpa", "eager"))])
