"""gated_mlp_act: the public functions, their backends, and the only validation of arguments."""

from __future__ import annotations

from collections.abc import Hashable
from math import inf
from typing import Literal

import torch
from torch import Tensor

from swathe.kernels.core.backends import cpp_backend, eager_backend, triton_backend
from swathe.kernels.core.choose import Chooser
from swathe.kernels.core.errors import did_you_mean
from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import AUTO, Choice, Prefer, register_backend, set_preference
from swathe.kernels.gated_mlp_act.op import fused

OP = "gated_mlp_act"
Casting = Literal["fp32", "llama"]
Packed = Literal["halves", "interleaved"]
CASTINGS: tuple[Casting, ...] = ("fp32", "llama")
LAYOUTS: tuple[Packed, ...] = ("halves", "interleaved")
ACTS = ("silu", "gelu_tanh", "gelu", "relu", "relu2", "gpt_oss")
# every spelling that is understood, transformers' config.hidden_act among them
SPELLINGS = {act: act for act in ACTS} | {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
}
# swiglu_limit and swiglu_alpha of GptOssConfig
LIMIT, ALPHA = 7.0, 1.702

_chooser = Chooser(OP, "act", "casting", "packed")


def gated_mlp_act(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    act: str = "silu",
    limit: float | None = None,
    alpha: float | None = None,
    casting: Casting = "fp32",
    packed: Packed = "halves",
    implementation: str | Choice = AUTO,
) -> Tensor:
    """act(gate) * up, the middle of a gated MLP.

    Shapes: gate, up, result (..., N). Without `up`, `gate` is both in one tensor (..., 2N): packed
    "halves" is [gate | up], "interleaved" has gates at even and ups at odd features; its gradient
    comes in the same layout.
    act: "silu", "gelu_tanh", "gelu", "relu", "relu2" (relu squared), "gpt_oss", or another of
    transformers' names for these. "gpt_oss" is (u + 1) * g * sigmoid(alpha * g) with
    g = min(gate, limit) and u = clamp(up, -limit, limit); limit is 7 and alpha 1.702 by default.
    Rounding: fp32 arithmetic (fp64 for fp64 input on "eager"). casting "fp32" rounds once; "llama"
    rounds after every operation of HF's code. HF composes "gelu_new", "gelu_fast" and
    "gelu_accurate" of more operations than that: they are rounded as "gelu_tanh" is.
    `implementation` is a backend's name, "auto", or a Choice from `resolve_gated_mlp_act`.

    Raises ValueError or TypeError for shapes, devices, dtypes and options that do not fit, before
    anything is launched; UnsupportedFeature or BackendUnavailable for a named backend that cannot
    serve. Second derivatives and forward-mode AD of fused backends raise.
    """
    _validate(gate, up, casting, packed)
    act = _checked_act(act, limit, alpha)
    # LIMIT and ALPHA in place: dynamo takes a global float for an input
    limit = 7.0 if limit is None else _checked_limit(limit, gate.dtype)
    alpha = 1.702 if alpha is None else alpha
    grad = wants_gradient(gate, up)
    facts = (gate.shape[-1], grad, act, casting, packed if up is None else None)
    call = _chooser.call_for(gate, implementation, *facts)
    return call(gate, up, act, limit, alpha, casting, packed)


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    casting: Casting = "fp32",
    packed: Packed = "halves",
    implementation: str | Choice = AUTO,
) -> Tensor:
    """silu(gate) * up: gated_mlp_act with act="silu"."""
    return gated_mlp_act(gate, up, casting=casting, packed=packed, implementation=implementation)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: Literal["tanh", "none"] = "tanh",
    casting: Casting = "fp32",
    packed: Packed = "halves",
    implementation: str | Choice = AUTO,
) -> Tensor:
    """gelu(gate) * up; `approximate` as in torch's gelu, but "tanh" unless said otherwise."""
    acts = {"tanh": "gelu_tanh", "none": "gelu"}
    if approximate not in acts:
        raise ValueError(
            f"geglu: approximate={approximate!r}{did_you_mean(str(approximate), acts)}; "
            f"allowed: {tuple(acts)}"
        )
    return gated_mlp_act(
        gate,
        up,
        act=acts[approximate],
        casting=casting,
        packed=packed,
        implementation=implementation,
    )


def reglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    casting: Casting = "fp32",
    packed: Packed = "halves",
    implementation: str | Choice = AUTO,
) -> Tensor:
    """relu(gate) * up: gated_mlp_act with act="relu"."""
    return gated_mlp_act(
        gate, up, act="relu", casting=casting, packed=packed, implementation=implementation
    )


def resolve_gated_mlp_act(
    gate: Tensor,
    implementation: str = AUTO,
    *,
    act: str = "silu",
    casting: Casting = "fp32",
    packed: Packed | None = None,
    grad: bool = True,
) -> Choice:
    """Choose a backend once, for calls with tensors like `gate` (meta tensors will do).

    `packed` is the layout where one tensor holds gate and up, None for two tensors. Raises as
    `gated_mlp_act` does for a backend that is unknown, unavailable or cannot serve.
    """
    facts = (gate.shape[-1], grad, _checked_act(act, None, None), casting, packed)
    return _chooser.choose(gate, implementation, *facts)


def _checked_act(act: str, limit: float | None, alpha: float | None) -> str:
    found = SPELLINGS.get(act)
    if found is None:
        raise ValueError(
            f"gated_mlp_act: act={act!r}{did_you_mean(str(act), SPELLINGS)}; "
            f"allowed: {tuple(SPELLINGS)}"
        )
    if found != "gpt_oss" and (limit is not None or alpha is not None):
        raise ValueError(
            f"gated_mlp_act: limit={limit} and alpha={alpha} with act={act!r}; only act='gpt_oss' "
            "takes them: leave them out, or clamp gate and up yourself"
        )
    # comparisons: dynamo traces them where a number of the model's is dynamic, but not isfinite
    if alpha is not None and not -inf < alpha < inf:
        raise ValueError(f"gated_mlp_act: alpha={alpha}; it must be a finite number")
    return found


def _checked_limit(limit: float, dtype: torch.dtype) -> float:
    if not 0 < limit <= torch.finfo(dtype).max:
        raise ValueError(
            f"gated_mlp_act: limit={limit}; it must be above zero and a number that {dtype} holds"
        )
    return limit


def _validate(gate: Tensor, up: Tensor | None, casting: str, packed: str) -> None:
    if casting not in CASTINGS:
        raise ValueError(
            f"gated_mlp_act: casting={casting!r}{did_you_mean(casting, CASTINGS)}; "
            f"allowed: {CASTINGS}"
        )
    if packed not in LAYOUTS:
        raise ValueError(
            f"gated_mlp_act: packed={packed!r}{did_you_mean(packed, LAYOUTS)}; allowed: {LAYOUTS}"
        )
    if gate.dim() == 0:
        raise ValueError("gated_mlp_act: gate is a scalar; it needs at least one dimension")
    if not gate.dtype.is_floating_point:
        raise TypeError(
            f"gated_mlp_act: gate is {gate.dtype}; it must be floating point: float16, bfloat16, "
            "float32, or float64 with implementation='eager'"
        )
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gated_mlp_act: without up, gate holds both and needs an even number of features, "
                f"not {gate.shape[-1]}"
            )
        return
    if packed != "halves":
        raise ValueError(
            f"gated_mlp_act: packed={packed!r} with up; it describes one tensor that holds both: "
            "leave out packed, or up"
        )
    if up.shape != gate.shape or up.device != gate.device:
        raise ValueError(
            f"gated_mlp_act: up is {tuple(up.shape)} on {up.device}; it must be "
            f"{tuple(gate.shape)} on {gate.device} like gate (expand it yourself if it is to be "
            "broadcast)"
        )
    if up.dtype != gate.dtype:
        raise TypeError(
            f"gated_mlp_act: up is {up.dtype} and gate {gate.dtype}; cast one to the other's dtype"
        )


_EVERYTHING: dict[str, frozenset[Hashable] | str] = {
    "act": frozenset[Hashable](ACTS),
    "casting": frozenset[Hashable](CASTINGS),
    "packed": frozenset[Hashable](LAYOUTS),
}

register_backend(eager_backend(OP, "swathe.kernels.gated_mlp_act.eager.gated_mlp_act", _EVERYTHING))
register_backend(
    cpp_backend(OP, lambda: fused("cpp", "swathe.kernels.gated_mlp_act._cpp"), _EVERYTHING)
)
register_backend(
    triton_backend(OP, lambda: fused("triton", "swathe.kernels.gated_mlp_act._triton"), _EVERYTHING)
)
set_preference(
    OP,
    [
        Prefer(("triton", "eager"), device="cuda"),
        Prefer(("cpp", "eager"), device="cpu"),
        Prefer(("eager",)),
    ],
)
