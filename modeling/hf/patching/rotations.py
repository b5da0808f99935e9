"""Rotary: the functions that attention forwards call, answered by the `rotary` op.

An attention keeps its own code, over a copy of its globals in which the rotary function is a
stand-in (rebinding.py). What the function computes is found by calling it (rotary_forms.py). The
module that makes cos and sin, mrope and all, is left alone.

The stand-in looks at its arguments once more: what the proof does not reach, tables of another
number of tokens, dtypes that differ, an argument that is seldom used, goes to the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from swathe.kernels.rotary.api import resolve_rotary
from swathe.modeling.hf.patching.admission import chosen, plain, why_left
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import Call, prove
from swathe.modeling.hf.patching.rebinding import (
    global_names,
    rebound,
    rewrapped,
    why_not_rewrapped,
    wrappers,
)
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.rotary_forms import RotaryFunction, may_be_rotary, read
from swathe.modeling.hf.patching.swaps import Undo, fused_class, recipe

OP = "rotary"
_HEAD = 64  # features of a head in a proof, where the module does not say


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """Every module whose forward calls a rotary function: with a stand-in for it, or a reason."""
    if not options.rope:
        return []
    return [
        candidate
        for path, module in model.named_modules()
        for candidate in _candidates(path, module, options.backend)
    ]


def _candidates(path: str, module: nn.Module, backend: str) -> Iterator[Candidate]:
    cls: Any = type(module)
    called = rotary_calls(cls)
    served: list[str] = []
    for name, form in called.items():
        if isinstance(form, str):
            yield Candidate(path, module, OP, reason=f"{name}: {form}")
        else:
            served.append(name)
    if not served:
        return
    forms = [form for form in called.values() if isinstance(form, RotaryFunction)]
    like = _like(module)
    dtype, device, features = like.dtype, like.device, like.shape[-1]
    tables = torch.float32 if any(len(form.tables) == 1 for form in forms) else dtype
    resolve = partial(resolve_rotary, like, like.to(tables))
    used, reason = chosen(resolve, OP, backend)
    own = list(module.parameters(recurse=False))
    reason = why_left(module, own) or why_not_rewrapped(cls.forward) or reason
    if reason is not None:
        yield Candidate(path, module, OP, used, reason)
        return

    def proof() -> Proof:
        proofs = [_proof(form, features, dtype, device, backend) for form in forms]
        failed = [found for found in proofs if found.failure is not None]
        return failed[0] if failed else max(proofs, key=lambda found: found.error)

    def apply(undo: Undo) -> None:
        forward = turned_forward(type(module), tuple(served), backend)
        undo.swap_class(module, fused_class(type(module), forward, op=OP))

    key = (OP, tuple(form.function for form in forms), features, dtype, device, backend)
    yield Candidate(path, module, OP, used, None, key, proof, apply)


@cache
def rotary_calls(cls: Any) -> dict[str, RotaryFunction | str]:
    """The rotary functions that the forward of `cls` calls, by their global names."""
    if why_not_rewrapped(cls.forward) is not None and not hasattr(cls.forward, "__code__"):
        return {}
    inner = wrappers(cls.forward)[-1]  # type: ignore[arg-type]
    found: dict[str, RotaryFunction | str] = {}
    for name in global_names(inner.__code__):
        function = inner.__globals__.get(name)
        if name not in found and may_be_rotary(function):
            found[name] = read(function)  # type: ignore[arg-type]
    return found


@recipe
def turned_forward(cls: Any, names: tuple[str, ...], backend: str) -> Callable[..., Any]:
    """The forward of `cls` with stand-ins for the rotary functions that it calls by `names`."""
    forward: Any = cls.forward
    inner = wrappers(forward)[-1]
    called = rotary_calls(cls)
    stands_in = {name: stand_in(called[name], backend) for name in names}  # type: ignore[arg-type]
    return rewrapped(forward, rebound(inner, stands_in))


@cache
def stand_in(form: RotaryFunction, backend: str) -> Callable[..., Any]:
    """A function to be called as `form.function` is."""
    function = form.function

    @wraps(function)
    def turned(*args: Any, **kwargs: Any) -> Any:
        given = given_to(form, args, kwargs)
        if given is None:
            return function(*args, **kwargs)
        q, k = form.turning(given.q, given.k, given.cos, given.sin, backend)
        return returned(form, given, q, k)

    return turned


class Given(NamedTuple):
    """What a rotary function was given, as the op takes it."""

    q: Tensor  # (B, H, S, D)
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    transposed: bool  # it came as (B, S, H, D)
    flat: bool  # and without B
    widened: bool  # q and k were cast to the dtype of the result


def returned(form: RotaryFunction, given: Given, q: Tensor, k: Tensor | None) -> Any:
    """The turned q and k in the layout that they came in, as the function returns them."""
    if given.transposed:
        q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
    if given.flat:
        q, k = q[0], None if k is None else k[0]
    return q if len(form.turned) == 1 or (k is None and form.alone == "tensor") else (q, k)


def given_to(form: RotaryFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    """The arguments as the op takes them; None where the function itself must be called."""
    if len(args) > len(form.parameters):
        return None
    given = {**dict(zip(form.parameters, args, strict=False)), **kwargs}
    xs = [given.pop(name, None) for name in form.turned]
    tables = [given.pop(name, None) for name in form.tables]
    axis = None if form.axis is None else given.pop(form.axis, form.axis_default)
    q, k = xs[0], xs[1] if len(xs) == 2 else None
    if k is None and len(xs) == 2 and form.alone is None:
        return None
    present = [t for t in (*xs, *tables) if t is not None]
    if (
        any(t is None for t in (q, *tables))
        or not plain(*present)
        or any(value is not None for value in given.values())
    ):
        return None
    cos, sin = tables if len(tables) == 2 else (tables[0].real, tables[0].imag)
    heads = form.layouts.get((q.dim(), cos.dim(), axis))
    if heads is None or (k is not None and k.dim() != q.dim()):
        return None
    flat = q.dim() == 3
    transposed = heads == (1 if flat else 2)
    q = _heads_first(q, transposed, flat)
    k = None if k is None else _heads_first(k, transposed, flat)
    if not _fits(form, q, k, cos, sin):
        return None
    wide = torch.promote_types(q.dtype, cos.dtype) if form.promotes else q.dtype
    widened = wide != q.dtype
    if widened:
        q, k = q.to(wide), None if k is None else k.to(wide)
    return Given(q, k, cos, sin, transposed, flat, widened)


def _heads_first(x: Tensor, transposed: bool, flat: bool) -> Tensor:
    x = x[None] if flat else x
    return x.transpose(1, 2) if transposed else x


def _fits(form: RotaryFunction, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
    B, _, S, D = q.shape
    W = cos.shape[-1]
    return (
        form.turning.serves(D, W)
        and (form.partial or form.turning.dim(W) == D)
        and cos.shape == sin.shape
        and cos.shape[-2] == S
        and (cos.dim() == 2 or cos.shape[0] in (1, B))
        and (k is None or (k.shape[0] == B and k.shape[2] == S and k.shape[3] == D))
        and q.is_floating_point()
        and (k is None or k.dtype == q.dtype)
        and cos.is_floating_point()
        and sin.dtype == cos.dtype
        and all(t.device == q.device for t in (cos, sin, *(() if k is None else (k,))))
        # fused backends give tables no gradient
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    )


class _Turning(nn.Module):
    """A module that calls a rotary function, for the proof."""

    def __init__(self, form: RotaryFunction) -> None:
        super().__init__()
        self.form, self.function = form, form.function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(**dict(zip(self.form.turned + self.form.tables, tensors, strict=True)))


def _proof(
    form: RotaryFunction, features: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Proof:
    ours = stand_in(form, backend)

    def fused(_: nn.Module, *tensors: Tensor) -> Any:
        named = dict(zip(form.turned + form.tables, tensors, strict=True))
        if given_to(form, (), named) is None:
            raise TypeError("the stand-in leaves these arguments to the function itself")
        return ours(**named)

    module = _Turning(form).to(device)
    return prove(module, fused, calls_of(form, features, dtype, device))


def calls_of(
    form: RotaryFunction, D: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Call]:
    """Random heads and angles, in a layout that a call without the axis has; endless."""
    layouts = {key: heads for key, heads in form.layouts.items() if key[2] == form.axis_default}
    (dims, table_dims, _), heads = max(layouts.items())
    B, H, S = 2, 3, 5
    sizes = [B, H, S, D] if heads == dims - 3 else [B, S, H, D]
    draw = Generator().manual_seed(0)
    widths = [D // form.turning.dim(1)]
    if form.partial and form.turning.serves(D, widths[0] // 2):
        widths.append(widths[0] // 2)
    for W in cycle(widths):
        xs = [torch.randn(sizes[4 - dims :], generator=draw) for _ in form.turned]
        xs = [x.to(device, dtype).requires_grad_() for x in xs]
        angles = torch.randn([B, S, W][3 - table_dims :], generator=draw) * 100
        cos, sin = angles.cos().to(device), angles.sin().to(device)
        if len(form.tables) == 1:
            yield Call((*xs, torch.complex(cos, sin)))
        else:
            yield Call((*xs, cos.to(dtype), sin.to(dtype)))


def _like(module: nn.Module) -> Tensor:
    """A head as the module's activations have them: their dtype is taken to be the parameters'."""
    features = getattr(module, "head_dim", None)
    features = features if isinstance(features, int) and features % 4 == 0 else _HEAD
    for p in module.parameters():
        if p.is_floating_point():
            return torch.empty(1, 1, 1, features, dtype=p.dtype, device=p.device)
    return torch.empty(1, 1, 1, features, device="cpu")
