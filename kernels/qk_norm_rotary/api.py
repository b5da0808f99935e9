"""qk_norm_rotary: the public function, its backends, and the only validation of its arguments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, overload

from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.errors import did_you_mean
from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import AUTO, Choice, Prefer, register_backend, set_preference
from swathe.kernels.core.rotation import tables_want_gradient, validate_rotation
from swathe.kernels.core.spec import ANY, FLOATS
from swathe.kernels.qk_norm_rotary.op import fused

OP = "qk_norm_rotary"
Casting = Literal["fp32", "llama"]
NormCasting = Literal["llama", "gemma", "fp32"]
CASTINGS: tuple[Casting, ...] = ("fp32", "llama")
NORM_CASTINGS: tuple[NormCasting, ...] = ("llama", "gemma", "fp32")
MAX_HEAD = 1024  # features of a head that the fused kernels hold in registers

_chooser = Chooser(OP, "weight_dtype", "table_dtype", "table_grad")


@overload
def qk_norm_rotary(
    q: Tensor,
    k: None,
    q_weight: Tensor,
    k_weight: None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: float = ...,
    norm_casting: NormCasting = ...,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    positions: Tensor | None = ...,
    mrope_section: Sequence[int] | None = ...,
    casting: Casting = ...,
    implementation: str | Choice = ...,
) -> Tensor: ...
@overload
def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: float = ...,
    norm_casting: NormCasting = ...,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    positions: Tensor | None = ...,
    mrope_section: Sequence[int] | None = ...,
    casting: Casting = ...,
    implementation: str | Choice = ...,
) -> tuple[Tensor, Tensor]: ...
def qk_norm_rotary(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: float = 0.0,
    norm_casting: NormCasting = "llama",
    rotary_dim: int | None = None,
    interleaved: bool = False,
    positions: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    casting: Casting = "fp32",
    implementation: str | Choice = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over each head of q and k, times `offset + weight`, then rotary, in one pass.

    Returns (q, k), or q alone where k and k_weight are None, in the memory order of the inputs.

    Shapes: q (B, H, S, D), k (B, Hk, S, D), usually transposed views of (B, S, H, D) memory, which
    are not copied; weights (D,). cos, sin: last dim R = rotary_dim (default D) or R/2; before it
    (S,) or (B or 1, S), or with `positions`, integers (S,) or (B, S), a table (P, .) that they
    index. `mrope_section` (t, h, w), pairs that sum to R/2, puts an axis of 3 in front of cos and
    sin, or of positions. `interleaved` pairs neighbours instead of halves.
    Rounding: casting "fp32" computes in fp32 and rounds once; norm_casting has no effect then.
    casting "llama" rounds where HF's attention does, bit for bit with tables of q's dtype:
    norm_casting "llama" as Qwen3RMSNorm, "gemma" (use offset=1) or "fp32" as Gemma3RMSNorm.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_qk_norm_rotary`.

    A norm over all heads of a projection together (OLMo2) is another function: use rms_norm on the
    projection and rotary after it. A cos or sin that requires a gradient is served by "eager" only.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve.
    Second derivatives and forward-mode AD of fused backends raise.
    """
    _validate(q, k, q_weight, k_weight, eps, norm_casting, casting)
    R = validate_rotation(OP, q, cos, sin, positions, mrope_section, rotary_dim)
    table_grad = tables_want_gradient(OP, cos, sin, implementation)
    grad = wants_gradient(q, k, q_weight, k_weight)
    facts = (q.shape[-1], grad, q_weight.dtype, cos.dtype, table_grad)
    call = _chooser.call_for(q, implementation, *facts)
    norm = (float(eps), float(offset), norm_casting, casting)
    return call(q, k, q_weight, k_weight, *norm, cos, sin, positions, mrope_section, R, interleaved)


def resolve_qk_norm_rotary(
    q: Tensor,
    q_weight: Tensor,
    cos: Tensor,
    implementation: str = AUTO,
    *,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like these (meta tensors will do).

    Raises as `qk_norm_rotary` does for a backend that is unknown, unavailable or cannot serve.
    """
    facts = (q.shape[-1], grad, q_weight.dtype, cos.dtype, wants_gradient(cos))
    return _chooser.choose(q, implementation, *facts)


def _validate(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    eps: float,
    norm_casting: str,
    casting: str,
) -> None:
    if q.dim() != 4 or q.shape[-1] == 0:
        raise ValueError(
            f"qk_norm_rotary: q has shape {tuple(q.shape)}; it must be (B, H, S, D): batch, heads, "
            "tokens and one or more features"
        )
    if not q.is_floating_point():
        raise TypeError(
            f"qk_norm_rotary: q is {q.dtype}; it must be floating point: float16, bfloat16, "
            "float32, or float64 with implementation='eager'"
        )
    if (k is None) != (k_weight is None):
        given, missing = ("k_weight", "k") if k is None else ("k", "k_weight")
        raise ValueError(
            f"qk_norm_rotary: {given} is given without {missing}; give both, or neither for q alone"
        )
    if k is not None:
        _validate_keys(q, k)
    _validate_weight(q, q_weight, "q_weight")
    if k_weight is not None:
        _validate_weight(q, k_weight, "k_weight")
        if k_weight.dtype != q_weight.dtype:
            raise TypeError(
                f"qk_norm_rotary: q_weight is {q_weight.dtype} and k_weight is {k_weight.dtype}; "
                "they must have one dtype: convert one of them"
            )
    for name, value, allowed in (
        ("casting", casting, CASTINGS),
        ("norm_casting", norm_casting, NORM_CASTINGS),
    ):
        if value not in allowed:
            raise ValueError(
                f"qk_norm_rotary: {name}={value!r}{did_you_mean(value, allowed)}; "
                f"allowed: {allowed}"
            )
    if not eps >= 0:
        raise ValueError(f"qk_norm_rotary: eps={eps}; it must be a number of zero or more")


def _validate_keys(q: Tensor, k: Tensor) -> None:
    B, _, S, D = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, S, D) or k.device != q.device:
        raise ValueError(
            f"qk_norm_rotary: k is {tuple(k.shape)} on {k.device}; with q of shape "
            f"{tuple(q.shape)} it must be ({B}, heads, {S}, {D}) on {q.device}"
        )
    if k.dtype != q.dtype:
        raise TypeError(
            f"qk_norm_rotary: q is {q.dtype} and k is {k.dtype}; they must have one dtype"
        )


def _validate_weight(q: Tensor, weight: Tensor, name: str) -> None:
    D = q.shape[-1]
    if weight.shape != (D,) or weight.device != q.device:
        raise ValueError(
            f"qk_norm_rotary: {name} is {tuple(weight.shape)} on {weight.device}; heads of {D} "
            f"features need a weight of ({D},) on {q.device}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"qk_norm_rotary: {name} is {weight.dtype}; it must be floating point")


_FUSED: dict[str, frozenset[Hashable] | str] = {
    "weight_dtype": frozenset[Hashable](FLOATS),
    "table_dtype": frozenset[Hashable](FLOATS),
}

register_backend(
    eager_backend(
        OP,
        "swathe.kernels.qk_norm_rotary.eager.qk_norm_rotary",
        {"weight_dtype": ANY, "table_dtype": ANY, "table_grad": ANY},
    )
)
register_backend(
    cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.qk_norm_rotary._cpp"), _FUSED)
)
register_backend(
    triton_backend(
        OP,
        lambda: fused("triton", "swathe.kernels.qk_norm_rotary._triton"),
        _FUSED,
        max_size=MAX_HEAD,
    )
)
set_preference(
    OP,
    [
        Prefer(("triton", "eager"), device="cuda"),
        Prefer(("cpp", "eager"), device="cpu"),
        Prefer(("eager",)),
    ],
)
