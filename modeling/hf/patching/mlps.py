"""Gated MLPs, down(act(gate(x)) * up(x)), found by what their forward computes.

The projections stay the model's own modules and are called as such, so that LoRA, quantised
linears and hooks on them keep working; only what is between them is fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swathe.kernels.gated_mlp_act.api import SPELLINGS, gated_mlp_act, resolve_gated_mlp_act
from swathe.modeling.hf.patching.admission import already, chosen, plain, sample_of, why_left
from swathe.modeling.hf.patching.canonical import Expression, product
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import Call, private, prove
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.swaps import Forward, Undo, fused_class, hooked, recipe
from swathe.modeling.hf.patching.symbolic import Trace, Unreadable, expression_of, trace
from swathe.modeling.layers.activations import ACT2FN

OP = "gated_mlp_act"
_X: Expression = ("input", 0)
_NAMED = re.compile("mlp|glu|feedforward|ffn|gated|experts", re.IGNORECASE)
_SIZE = 64  # features of the proof where no projection says how many there are
# activations that autocast does not cast: one function of torch, or relu
_IN_AUTOCAST = frozenset(("silu", "gelu", "gelu_tanh", "relu"))
_SHAPES = ((1,), (3,), (2, 5), (7,))


@dataclass(frozen=True)
class GatedForm:
    """tail(act(gate) * up) of one module, by the names of its parts.

    `projections` are gate and up, or the one that gives both; `second` says that the activation is
    on its second half. `tail` is what follows, innermost first. `inlined` are the parts that the
    fused forward does not call: the activation, dropout that does nothing.
    """

    projections: tuple[str, ...]
    act: str
    tail: tuple[str, ...]
    inlined: tuple[str, ...]
    second: bool = False
    in_autocast: bool = True


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """Every gated MLP of the model, and every module that is named like one."""
    if not options.swiglu:
        return []
    found, sample = [], sample_of(model)
    for path, module in model.named_modules():
        candidate = already(path, module, OP)
        if candidate is None and not isinstance(module, PreTrainedModel):
            candidate = _candidate(path, module, sample, options)
        if candidate is not None:
            found.append(candidate)
    return found


def gated_form(read: Trace) -> GatedForm | None:
    """The gated MLP that a forward is."""
    e, tail = read.expression, []
    while e[0] == "call" and len(e) == 3 and isinstance(e[2], tuple) and e[2] != _X:
        tail.append(e[1])
        e = e[2]
    if e[0] != "mul":
        return None
    for gate, up in permutations(_atoms(e), 2):
        for function, act in _activations():
            if product(expression_of(function, gate), up) == e:
                return _form(gate, up, act, function, tuple(reversed(tail)), read)
    return None


def _form(
    gate: Expression,
    up: Expression,
    act: str,
    function: Callable[[Tensor], Tensor],
    tail: tuple[str, ...],
    read: Trace,
) -> GatedForm | None:
    single = len(expression_of(function, _X)) == 2
    rest = (act, tail, read.inlined)
    if gate[0] == up[0] == "call":
        names: tuple[str, ...] = (gate[1], up[1])
        form = GatedForm(names, *rest, in_autocast=single)
    elif gate[0] == up[0] == "piece" and gate[1] == up[1]:
        names = (gate[1][1],)
        form = GatedForm(names, *rest, second=gate[2] == 1, in_autocast=single)
    else:
        return None
    direct = not any("." in name for name in (*names, *tail))
    return form if direct and len({*names, *tail}) == len(names) + len(tail) else None


def _atoms(e: Any) -> list[Expression]:
    """The projections of the input that an expression is made of, halves of one among them."""
    if not isinstance(e, tuple):
        return []
    called = e[:1] == ("call",) and e[2:] == (_X,)
    halved = e[:1] == ("piece",) and e[3] == 2 and e[1][:1] == ("call",) and e[1][2:] == (_X,)
    if called or halved:
        return [e]
    return list(dict.fromkeys(atom for part in e for atom in _atoms(part)))


@cache
def _activations() -> tuple[tuple[Callable[[Tensor], Tensor], str], ...]:
    """Every way of writing an activation that the op has."""
    swish: Callable[[Tensor], Tensor] = lambda x: x * torch.sigmoid(x)  # noqa: E731
    named = [(ACT2FN[name], act) for name, act in SPELLINGS.items() if name in ACT2FN]
    return (*named, (swish, "silu"))


def _candidate(path: str, module: nn.Module, sample: Tensor, options: Options) -> Candidate | None:
    kept = Candidate(path, module, OP, reason="computes no gated MLP that we have")
    named = _NAMED.search(type(module).__name__) is not None
    # quantised projections may have their weights among the buffers
    if not any([*part.parameters(), *part.buffers()] for part in module.children()):
        own = module._parameters.values()
        experts = named and any(p is not None and p.dim() == 3 for p in own)
        reason = "holds the weights of several experts, which the op does not serve"
        return Candidate(path, module, OP, reason=reason) if experts else None
    try:
        read = trace(module)
    except Unreadable as error:
        return Candidate(path, module, OP, reason=f"its forward {error}") if named else None
    form = gated_form(read)
    if form is None:
        return kept if named else None
    return _of_form(path, module, form, read, sample, options)


def _of_form(
    path: str,
    module: nn.Module,
    form: GatedForm,
    read: Trace,
    sample: Tensor,
    options: Options,
) -> Candidate:
    weights = [p for p in module.parameters() if p.is_floating_point()]
    reason = why_left(module, weights)
    if reason is not None:
        return Candidate(path, module, OP, reason=reason)
    like = weights[0] if weights else sample
    backend, reason = chosen(partial(_resolve, form, like), OP, options.backend)
    if reason is not None:
        return Candidate(path, module, OP, backend, reason)
    forward = fused_forward(type(module), form, options.backend)
    size = getattr(module.get_submodule(form.projections[0]), "out_features", _SIZE)
    N = size if len(form.projections) == 2 else size // 2

    def proof() -> Proof:
        return prove(_without_projections(module, form, N), forward, _calls(N, like))

    def apply(undo: Undo) -> None:
        undo.swap_class(module, fused_class(type(module), forward, op=OP))

    key = (type(module), forward, read.expression, like.dtype, like.device, N)
    return Candidate(path, module, OP, backend, None, key, proof, apply)


def _resolve(form: GatedForm, like: Tensor, backend: str) -> Any:
    packed: Any = "halves" if len(form.projections) == 1 and not form.second else None
    flat = like.detach().flatten()
    return resolve_gated_mlp_act(flat, backend, act=form.act, casting="llama", packed=packed)


class _Half(nn.Module):
    """Stands for a projection: the first or second half of the input, as it is."""

    def __init__(self, size: int, second: bool) -> None:
        super().__init__()
        self.size, self.second = size, second

    def forward(self, x: Tensor) -> Tensor:
        half = x[..., self.size :] if self.second else x[..., : self.size]
        return half.contiguous()


def _without_projections(module: nn.Module, form: GatedForm, N: int) -> nn.Module:
    """The module with what it projects handed in, so that a proof costs no matrix products."""
    stands: dict[str, nn.Module] = {name: nn.Identity() for name in form.tail}
    if len(form.projections) == 1:
        stands[form.projections[0]] = nn.Identity()
    else:
        gate, up = form.projections
        stands |= {gate: _Half(N, False), up: _Half(N, True)}
    return private(module, lambda t: t.detach().clone(), stands)


def _calls(N: int, like: Tensor) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    for i in count():
        x = torch.randn(*_SHAPES[i % len(_SHAPES)], 2 * N, generator=generator) * (2, 0.1, 6)[i % 3]
        yield Call((x.to(like.device, like.dtype).requires_grad_(),))


def _hooked(module: nn.Module, names: tuple[str, ...]) -> bool:
    for name in names:
        module = getattr(module, name)
    return hooked(module)


@recipe
def fused_forward(cls: type[nn.Module], form: GatedForm, backend: str) -> Forward:
    """The forward for modules of `cls` with this form.

    The class's own serves further arguments, hooks on parts that are not called here, and
    projections that give what the kernel does not read.
    """
    own: Callable[..., Any] = cls.forward
    projections, tail = form.projections, form.tail
    inlined = tuple(tuple(name.split(".")) for name in form.inlined)
    act, second, in_autocast = form.act, form.second, form.in_autocast

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or any(_hooked(self, names) for names in inlined):
            return own(self, *args, **kwargs)
        x = args[0]
        if not in_autocast and torch.is_autocast_enabled(x.device.type):
            return own(self, x)
        gate, *ups = [getattr(self, name)(x) for name in projections]
        up = ups[0] if ups else None
        if not plain(gate, up) or (up is not None and up.dtype != gate.dtype):
            return own(self, x)
        if second:
            up, gate = gate.chunk(2, dim=-1)
        y = gated_mlp_act(gate, up, act=act, casting="llama", implementation=backend)
        for name in tail:
            y = getattr(self, name)(y)
        return y

    return forward
