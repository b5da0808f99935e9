"""A residual sum and the norm after it, in one call of rms_norm or layer_norm.

The forward of a layer is rewritten (rewriting.py) and the layer gets a subclass of its class with
the result. Sum and norm are all that changes: what is captured, checkpointed or hooked around the
layer sees the same tensors. Only sums inside one forward are joined; the last sum of a layer and
the first norm of the next are not, since hidden states are captured between them.

At each call the norm is looked at again: with hooks on it, of another class (an adapter), under an
autocast that it would see, or for tensors that the kernel does not read, the sum is formed and the
norm is called, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from swathe.kernels.core.registry import Choice
from swathe.kernels.layer_norm.api import layer_norm, resolve_layer_norm
from swathe.kernels.norm.api import resolve_rms_norm, rms_norm
from swathe.modeling.hf.patching.admission import chosen, plain, why_left
from swathe.modeling.hf.patching.norm_forms import RMSForm
from swathe.modeling.hf.patching.norms import Form, norm_form
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import Call, private, prove
from swathe.modeling.hf.patching.rebinding import rewrapped, why_not_rewrapped, wrappers
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.rewriting import in_place, rewritten, sites
from swathe.modeling.hf.patching.sources import Unreadable
from swathe.modeling.hf.patching.swaps import Forward, Undo, fused_class, hooked, recipe

OP = "residual_norm"
Joined = tuple[str, Any, Form, torch.dtype | None]  # attribute, class, form, only dtype
_SCALES = (1.0, 1e-2, 10.0)
_SHAPES = ((1,), (3,), (2, 5), (7,))


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """Every module whose forward norms a sum: how both are joined, or why they are not."""
    if not options.residual:
        return []
    return [
        candidate
        for path, module in model.named_modules()
        if any(map(_may_be_a_norm, module.children()))
        for candidate in _candidates(path, module, options.backend)
    ]


def _candidates(path: str, module: nn.Module, backend: str) -> Iterator[Candidate]:
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return
    inner = wrappers(forward)[-1]
    try:
        names = {site.norm for site in sites(inner) if site.reached(module)}
        summed_in_place = in_place(inner)
    except Unreadable as error:
        yield Candidate(path, module, OP, reason=str(error))
        return
    for name in summed_in_place:
        if _form_at(module, name) is not None:
            yield Candidate(path, module, OP, reason=f"the sum that {name} takes is made in place")
    forms = {name: form for name in sorted(names) if (form := _form_at(module, name)) is not None}
    if not forms:
        return
    own = [t for name in forms for t in module.get_submodule(name).parameters()]
    reason = why_left(module, own) or why_not_rewrapped(forward)
    reasons = [_why_not_joined(module.get_submodule(name), name) for name in forms]
    backends = [_served(module.get_submodule(name), form, backend) for name, form in forms.items()]
    reason = reason or next((r for r in (*reasons, *(why for _, why in backends)) if r), None)
    used = ", ".join(sorted({name for name, _ in backends}))
    if reason is not None:
        yield Candidate(path, module, OP, used, reason)
    else:
        yield _joined_candidate(path, module, forms, used, backend)


def _joined_candidate(
    path: str, module: nn.Module, forms: dict[str, Form], used: str, backend: str
) -> Candidate:
    norms = {name: module.get_submodule(name) for name in forms}
    joined = tuple(
        (name, own_class(norms[name]), form, _only(norms[name], form))
        for name, form in forms.items()
    )

    def proof() -> Proof:
        proofs = [
            prove(_SumAndNorm(norms[name]), _fused(form, backend), _calls(norms[name], form))
            for name, form in forms.items()
        ]
        failed = [found for found in proofs if found.failure is not None]
        return failed[0] if failed else max(proofs, key=lambda found: found.error)

    def apply(undo: Undo) -> None:
        forward = joined_forward(type(module), joined, backend)
        undo.swap_class(module, fused_class(type(module), forward, op=OP))

    weights = tuple((t.shape, t.dtype, t.device) for n in norms.values() for t in n.parameters())
    key = (OP, joined, weights, backend)
    return Candidate(path, module, OP, used, None, key, proof, apply)


@recipe
def joined_forward(cls: type[nn.Module], joined: tuple[Joined, ...], backend: str) -> Forward:
    """The forward of `cls` with the sum before each norm in `joined` and that norm as one call."""
    forward: Any = cls.forward
    calls = {
        name: add_norm(norm_class, form, only, backend) for name, norm_class, form, only in joined
    }
    names = " and ".join(calls)
    title = f"<{cls.__module__}.{cls.__qualname__}.forward, sums joined with {names}>"
    return rewrapped(forward, rewritten(wrappers(forward)[-1], calls, title))


@cache
def add_norm(
    cls: Any, form: Form, only: torch.dtype | None, backend: str
) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function of (norm, a, b) that returns a + b and the norm of it.

    It is one call of the op for a norm of class `cls`, whose form was read, if nothing hangs on it.
    """
    weight_name, bias_name = form.weight, getattr(form, "bias", None)
    call: Any = _rms_call if isinstance(form, RMSForm) else _layer_call
    in_autocast = form.in_autocast

    def joined(norm: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if not hooked(norm) and own_class(norm) is cls:
            weight = None if weight_name is None else getattr(norm, weight_name)
            bias = None if bias_name is None else getattr(norm, bias_name)
            if (
                plain(a, b, weight, bias)
                and a.shape == b.shape
                and a.dtype == b.dtype
                and a.device == b.device
                and (weight is None or weight.device == a.device)
                and (only is None or (a.dtype == only and (weight is None or weight.dtype == only)))
                and (in_autocast or not torch.is_autocast_enabled(a.device.type))
            ):
                found: tuple[Tensor, Tensor] = call(a, b, weight, bias, form, backend)
                return found
        total = a + b
        return total, norm(total)

    return joined


def _rms_call(
    a: Tensor, b: Tensor, weight: Tensor | None, bias: None, form: RMSForm, backend: str
) -> tuple[Tensor, Tensor]:
    if weight is None:
        weight = a.new_ones(a.shape[-1])
    given: dict[str, Any] = {"offset": form.offset, "casting": form.casting}
    normed, total = rms_norm(b, weight, form.eps, residual=a, implementation=backend, **given)
    return total, normed


def _layer_call(
    a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, backend: str
) -> tuple[Tensor, Tensor]:
    normed, total = layer_norm(b, weight, bias, form.eps, residual=a, implementation=backend)
    return total, normed


def _may_be_a_norm(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    parts = any(next(part.parameters(), None) is not None for part in module.children())
    return len(own) <= 2 and all(p.dim() <= 1 for p in own) and not parts


def _form_at(module: nn.Module, name: str) -> Form | None:
    norm = module._modules.get(name)
    return norm_form(bare(norm)) if norm is not None and _may_be_a_norm(norm) else None


def bare(norm: nn.Module) -> nn.Module:
    """A copy with the same tensors and without hooks, of the class that it had."""
    made = private(norm, lambda t: t)
    made.__class__ = own_class(norm)
    return made


def own_class(norm: nn.Module) -> type[nn.Module]:
    """Its class, before the norm itself was patched."""
    made_of: tuple[type[nn.Module], Any] = getattr(norm, "_swathe_made_of", (type(norm), ()))
    return made_of[0]


def _only(norm: nn.Module, form: Form) -> torch.dtype | None:
    """The one dtype that the form holds for, None if it holds for all."""
    return _like(norm, form).dtype if form.alike else None


def _like(norm: nn.Module, form: Form) -> Tensor:
    like: Tensor | None = None if form.weight is None else getattr(norm, form.weight)
    return torch.empty(64, device="cpu") if like is None else like


def _why_not_joined(norm: nn.Module, name: str) -> str | None:
    return f"the weights of {name} are parametrized" if is_parametrized(norm) else None


def _served(norm: nn.Module, form: Form, backend: str) -> tuple[str, str | None]:
    """The backend that is to serve, or why none does."""
    op = "rms_norm" if isinstance(form, RMSForm) else "layer_norm"
    return chosen(partial(_resolve, form, _like(norm, form)), op, backend)


def _resolve(form: Form, like: Tensor, backend: str) -> Choice:
    if isinstance(form, RMSForm):
        given: dict[str, Any] = {"offset": form.offset, "casting": form.casting}
        return resolve_rms_norm(like, like, backend, residual=True, **given)
    return resolve_layer_norm(like, like, backend, residual=True)


class _SumAndNorm(nn.Module):
    """What is joined, as it was, for the proof."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = bare(norm)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, self.norm(total)


def _fused(form: Form, backend: str) -> Callable[..., Any]:
    call: Any = _rms_call if isinstance(form, RMSForm) else _layer_call

    def fused(module: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weight = None if form.weight is None else getattr(module.norm, form.weight)
        bias_name = getattr(form, "bias", None)
        bias = None if bias_name is None else getattr(module.norm, bias_name)
        found: tuple[Tensor, Tensor] = call(a, b, weight, bias, form, backend)
        return found

    return fused


def _calls(norm: nn.Module, form: Form) -> Iterator[Call]:
    """Pairs of rows in the dtypes that the norm may meet."""
    like = _like(norm, form)
    draw = Generator().manual_seed(0)
    dtypes = [like.dtype]
    if like.dtype == torch.float32 and not form.alike and form.in_autocast:
        dtypes.append(torch.bfloat16)
    for i in count():
        shape, scale = _SHAPES[i % len(_SHAPES)], _SCALES[i % len(_SCALES)]
        rows = torch.randn(2, *shape, like.shape[0], generator=draw) * scale
        dtype = dtypes[(i // 2) % len(dtypes)]
        a, b = (t.to(like.device, dtype).requires_grad_() for t in rows)
        yield Call((a, b))
