"""rotary: the public function, its backends, and the only validation of its arguments."""

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
from swathe.kernels.rotary.op import fused

OP = "rotary"
Casting = Literal["fp32", "llama"]
CASTINGS: tuple[Casting, ...] = ("fp32", "llama")
MAX_HEAD = 4096  # features of a head that the fused kernel holds in registers

_chooser = Chooser(OP, "table_dtype", "table_grad")


@overload
def rotary(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    positions: Tensor | None = ...,
    mrope_section: Sequence[int] | None = ...,
    casting: Casting = ...,
    implementation: str | Choice = ...,
) -> Tensor: ...
@overload
def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = ...,
    interleaved: bool = ...,
    positions: Tensor | None = ...,
    mrope_section: Sequence[int] | None = ...,
    casting: Casting = ...,
    implementation: str | Choice = ...,
) -> tuple[Tensor, Tensor]: ...
def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    positions: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    casting: Casting = "fp32",
    implementation: str | Choice = AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Turn every pair of features of q and k by its token's angle, in one pass.

    Returns (q, k), or q alone where k is None: new tensors in the memory order of the inputs.

    Shapes: q (B, H, S, D), k (B, Hk, S, D), usually transposed views of (B, S, H, D) memory, which
    are not copied. cos, sin: last dim R = rotary_dim (default D) or R/2; before it (S,) or
    (B or 1, S), or with `positions`, integers (S,) or (B or 1, S), a table (P, .) that they index.
    `mrope_section` (t, h, w), pairs that sum to R/2, puts an axis of 3 in front of cos and sin, or
    of positions. `interleaved` pairs neighbours (GPT-J, Cohere) instead of halves (Llama).
    Rounding: casting "fp32" computes in fp32 and rounds once; "llama" rounds products and sum as
    HF's apply_rotary_pos_emb does, bit for bit with tables of q's dtype. A position outside its
    table gives NaN on a GPU, IndexError on a CPU.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_rotary`.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, before anything
    is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot serve: a
    cos or sin that requires a gradient is served by "eager" only. Second derivatives and
    forward-mode AD of fused backends raise.
    """
    _validate(q, k, casting)
    R = validate_rotation(OP, q, cos, sin, positions, mrope_section, rotary_dim)
    table_grad = tables_want_gradient(OP, cos, sin, implementation)
    facts = (q.shape[-1], wants_gradient(q, k), cos.dtype, table_grad)
    call = _chooser.call_for(q, implementation, *facts)
    return call(q, k, cos, sin, positions, mrope_section, R, interleaved, casting)


def resolve_rotary(
    q: Tensor, cos: Tensor, implementation: str = AUTO, *, grad: bool = True
) -> Choice:
    """Choose a backend once, for calls with tensors like these (meta tensors will do).

    Raises as `rotary` does for a backend that is unknown, unavailable or cannot serve.
    """
    return _chooser.choose(q, implementation, q.shape[-1], grad, cos.dtype, False)


def _validate(q: Tensor, k: Tensor | None, casting: str) -> None:
    if q.dim() != 4 or q.shape[-1] == 0:
        raise ValueError(
            f"rotary: q has shape {tuple(q.shape)}; it must be (B, H, S, D), that is batch, heads, "
            "tokens and one or more features"
        )
    if not q.is_floating_point():
        raise TypeError(
            f"rotary: q is {q.dtype}; it must be floating point: float16, bfloat16, float32, or "
            "float64 with implementation='eager'"
        )
    if k is not None:
        B, _, S, D = q.shape
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, S, D) or k.device != q.device:
            raise ValueError(
                f"rotary: k is {tuple(k.shape)} on {k.device}; with q of shape {tuple(q.shape)} it "
                f"must be ({B}, heads, {S}, {D}) on {q.device}"
            )
        if k.dtype != q.dtype:
            raise TypeError(f"rotary: q is {q.dtype} and k is {k.dtype}; they must have one dtype")
    if casting not in CASTINGS:
        raise ValueError(
            f"rotary: casting={casting!r}{did_you_mean(casting, CASTINGS)}; allowed: {CASTINGS}"
        )


register_backend(
    eager_backend(OP, "swathe.kernels.rotary.eager.rotary", {"table_dtype": ANY, "table_grad": ANY})
)
_FUSED: dict[str, frozenset[Hashable] | str] = {"table_dtype": frozenset[Hashable](FLOATS)}

register_backend(cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.rotary._cpp"), _FUSED))
register_backend(
    triton_backend(
        OP, lambda: fused("triton", "swathe.kernels.rotary._triton"), _FUSED, max_size=MAX_HEAD
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
