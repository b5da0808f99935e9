"""The norms of q and k and the rotary function after them, in one call of qk_norm_rotary.

The forward of the attention is rewritten (delaying.py): where nothing hangs on the norms, they wait
for the rotary function, and one call does both. At each call that cannot be served, norms and
rotary function run one after the other, as before.
"""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary, resolve_qk_norm_rotary
from swathe.modeling.hf.patching.admission import chosen, plain, why_left
from swathe.modeling.hf.patching.delaying import Calls, Site, Turned, rewritten, sites
from swathe.modeling.hf.patching.layers import bare, own_class
from swathe.modeling.hf.patching.norm_forms import RMSForm
from swathe.modeling.hf.patching.norms import norm_form
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import prove
from swathe.modeling.hf.patching.rebinding import rewrapped, why_not_rewrapped, wrappers
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.rotary_forms import RotaryFunction
from swathe.modeling.hf.patching.rotations import (
    calls_of,
    given_to,
    returned,
    rotary_calls,
    stand_in,
)
from swathe.modeling.hf.patching.sources import Unreadable
from swathe.modeling.hf.patching.swaps import Forward, Undo, fused_class, hooked, recipe

OP = "qk_norm_rotary"
Norms = tuple[tuple[Any, RMSForm], ...]  # class and form of the norm of q, and of that of k


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """Every attention that norms each head of q and k and turns them: how both become one call.

    One that does so in a way that the op has no form of is left to the finders of either part.
    """
    if not (options.rope and options.rms_norm):
        return []
    found = (
        _candidate(path, module, options.backend)
        for path, module in model.named_modules()
        if rotary_calls(_class(module))
    )
    return [candidate for candidate in found if candidate is not None]


def _candidate(path: str, module: nn.Module, backend: str) -> Candidate | None:
    cls = _class(module)
    served = {n: f for n, f in rotary_calls(cls).items() if isinstance(f, RotaryFunction)}
    if why_not_rewrapped(cls.forward) is not None:
        return None
    try:
        found = sites(wrappers(cls.forward)[-1], _turned(served))
    except Unreadable:
        return None
    norms = {site: read for site in found if (read := _norms_at(module, site, served)) is not None}
    if not norms:
        return None
    weights = [
        getattr(module.get_submodule(name), str(form.weight))
        for site, read in norms.items()
        for name, (_, form) in zip(site.norms, read, strict=True)
    ]
    like = weights[0]
    head = torch.empty(1, 1, 1, like.shape[0], dtype=like.dtype, device=like.device)
    backend_name, reason = chosen(partial(resolve_qk_norm_rotary, head, like, head), OP, backend)
    reason = why_left(module, weights) or reason
    if reason is not None:
        return Candidate(path, module, OP, backend_name, reason)

    def proof() -> Proof:
        proofs = [_proof(module, s, served[s.function], n, backend) for s, n in norms.items()]
        failed = [one for one in proofs if one.failure is not None]
        return failed[0] if failed else max(proofs, key=lambda one: one.error)

    def apply(undo: Undo) -> None:
        forward = delayed_forward(cls, tuple(norms.items()), backend)
        undo.swap_class(module, fused_class(cls, forward, op=OP))

    kinds = tuple((w.shape, w.dtype, w.device) for w in weights)
    key = (OP, tuple((served[s.function].function, n) for s, n in norms.items()), kinds, backend)
    return Candidate(path, module, OP, backend_name, None, key, proof, apply)


def _class(module: nn.Module) -> Any:
    return type(module)


def _turned(served: dict[str, RotaryFunction]) -> Turned:
    return tuple((name, form.parameters, len(form.turned)) for name, form in served.items())


def _norms_at(module: nn.Module, site: Site, served: dict[str, RotaryFunction]) -> Norms | None:
    """Classes and forms of the norms at a site; None where one call cannot do what they do."""
    turning = served[site.function].turning
    read: list[tuple[Any, RMSForm]] = []
    widths = set()
    for name in site.norms:
        norm = module._modules.get(name)
        form = None if norm is None else norm_form(bare(norm))
        if norm is None or not isinstance(form, RMSForm) or form.weight is None:
            return None
        read.append((own_class(norm), form))
        widths.add(getattr(norm, form.weight).shape)
    alike = {(form.eps, form.offset, form.casting) for _, form in read}
    good = len(alike) == len(widths) == 1 and not turning.tail and not turning.regrouped
    return tuple(read) if good else None


@recipe
def delayed_forward(cls: Any, norms: tuple[tuple[Site, Norms], ...], backend: str) -> Forward:
    """The forward of `cls` with norms and rotary function at each site as one call."""
    forward: Any = cls.forward
    inner: FunctionType = wrappers(forward)[-1]
    served = {n: f for n, f in rotary_calls(cls).items() if isinstance(f, RotaryFunction)}
    calls = {site: _calls(served[site.function], read, backend) for site, read in norms}
    others = {name: stand_in(form, backend) for name, form in served.items()}
    # one title for each text: tracebacks find it by that
    names = " and ".join(name for site, _ in norms for name in site.norms)
    title = f"<{cls.__module__}.{cls.__qualname__}.forward, {names} joined with rotary>"
    return rewrapped(forward, rewritten(inner, _turned(served), calls, others, title))


def _later(waits: bool, norm: nn.Module, x: Tensor) -> Tensor:
    if waits:
        return x
    found: Tensor = norm(x)
    return found


@cache
def _calls(form: RotaryFunction, norms: Norms, backend: str) -> Calls:
    rotate = stand_in(form, backend)

    def ready(*parts: nn.Module | None) -> bool:
        return all(
            norm is not None
            and not hooked(norm)
            and own_class(norm) is cls
            and plain(getattr(norm, str(read.weight)))
            for norm, (cls, read) in zip(parts, norms, strict=False)
        )

    def turn(
        waits: bool, q_norm: nn.Module, k_norm: nn.Module | None, *args: Any, **kwargs: Any
    ) -> Any:
        if not waits:
            return rotate(*args, **kwargs)
        found = _turned_together(form, norms, backend, (q_norm, k_norm), args, kwargs)
        if found is not None:
            return found
        named = {**dict(zip(form.parameters, args, strict=False)), **kwargs}
        for name, norm in zip(form.turned, (q_norm, k_norm), strict=False):
            assert norm is not None
            named[name] = norm(named[name])
        return rotate(**named)

    return Calls(ready, _later, turn)


def _turned_together(
    form: RotaryFunction,
    norms: Norms,
    backend: str,
    parts: tuple[nn.Module, nn.Module | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What the norms and the rotary function give, None where one call cannot."""
    given = given_to(form, args, kwargs)
    if given is None or (given.k is None and len(form.turned) == 2):
        return None
    weights = [
        getattr(part, str(read.weight))
        for part, (_, read) in zip(parts, norms, strict=False)
        if part is not None
    ]
    features = (given.q.shape[-1],)
    # elsewhere the norm, or the tables, would widen the result
    if given.widened or any(
        w.shape != features or w.dtype != given.q.dtype or w.device != given.q.device
        for w in weights
    ):
        return None
    read = norms[0][1]
    turning = form.turning
    cos, sin = turning.tables(given.cos, given.sin)
    q_weight, k_weight = weights if len(weights) == 2 else (weights[0], None)
    call: Any = qk_norm_rotary
    found = call(
        given.q,
        given.k,
        q_weight,
        k_weight,
        read.eps,
        cos,
        sin,
        offset=read.offset,
        norm_casting=read.casting,
        rotary_dim=turning.dim(given.cos.shape[-1]),
        interleaved=turning.interleaved,
        implementation=backend,
    )
    q, k = (found, None) if given.k is None else found
    return returned(form, given, q, k)


class _NormsAndTurning(nn.Module):
    """What becomes one call, as it was, for the proof."""

    def __init__(self, form: RotaryFunction, norms: list[nn.Module]) -> None:
        super().__init__()
        self.form, self.function = form, form.function
        self.norms = nn.ModuleList(bare(norm) for norm in norms)

    def forward(self, *tensors: Tensor) -> Any:
        count = len(self.form.turned)
        normed = [norm(x) for norm, x in zip(self.norms, tensors[:count], strict=True)]
        names = self.form.turned + self.form.tables
        return self.function(**dict(zip(names, (*normed, *tensors[count:]), strict=True)))


def _proof(
    module: nn.Module, site: Site, form: RotaryFunction, norms: Norms, backend: str
) -> Proof:
    parts = [getattr(module, name) for name in site.norms]
    weight: Tensor = getattr(parts[0], str(norms[0][1].weight))

    def fused(twin: Any, *tensors: Tensor) -> Any:
        named = dict(zip(form.turned + form.tables, tensors, strict=True))
        both = (twin.norms[0], twin.norms[1] if len(twin.norms) == 2 else None)
        found = _turned_together(form, norms, backend, both, (), named)
        if found is None:
            raise TypeError("these arguments are not served by one call")
        return found

    calls = calls_of(form, weight.shape[0], weight.dtype, weight.device)
    return prove(_NormsAndTurning(form, parts), fused, calls)
