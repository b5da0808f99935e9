"""What a model is compared with: another model, or itself as it was before swathe came to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from swathe.modeling.hf.patching.patch import holders, ledger
from swathe.modeling.hf.patching.swaps import Undo
from swathe.modeling.hf.verification import Check
from swathe.modeling.model import PreTrainedModel

_OUR_ATTENTION = ("triton", "swathe")
_ATTENTION, _EXPERTS = "_attn_implementation_internal", "_experts_implementation_internal"


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back training flags and buffers, by identity and value."""
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def referring(model: nn.Module, other: nn.Module | None) -> Iterator[str]:
    """Inside, the reference can be run; gives its description.

    Without `other` the model itself becomes it: unpatched, with eager attention, and is exactly
    what it was afterwards. Raises ValueError where that changes nothing.
    """
    if other is not None:
        yield f"the given {type(other).__name__}"
        return
    with ExitStack() as stack:
        done = []
        if isinstance(model, PreTrainedModel):
            stack.enter_context(_eager_kernels(model))
            done.append("with eager kernels")
        found = holders(model)
        if found:
            for holder in found:
                stack.enter_context(_suspended(ledger(holder)))
            done.append("unpatched")
        ours = [c for c in _configs(model) if getattr(c, _ATTENTION, None) in _OUR_ATTENTION]
        if ours:
            stack.enter_context(_eager(ours, _ATTENTION))
            done.append("with attn_implementation 'eager'")
        if not done:
            raise ValueError(
                f"verify: this {type(model).__name__} is neither patched nor runs attention of "
                f"swathe ({', '.join(_OUR_ATTENTION)}): it would be compared with itself. Patch it "
                "first, or give the model to compare it with as reference="
            )
        yield f"the same {type(model).__name__} {' and '.join(done)}"


@contextmanager
def _suspended(undo: Undo) -> Iterator[None]:
    changes = list(undo.changes)
    targets = {id(change.target): change.target for change in changes}.values()
    saved = [(t, type(t), dict(vars(t)), dict(getattr(t, "_modules", {}))) for t in targets]
    undo.restore()
    try:
        yield
    finally:
        for target, cls, attributes, parts in saved:
            target.__class__ = cls
            vars(target).clear()
            vars(target).update(attributes)
            if parts:
                target._modules.clear()
                target._modules.update(parts)
        undo.changes[:] = changes


@contextmanager
def _eager_kernels(model: PreTrainedModel) -> Iterator[None]:
    policy = model._kernel_policy
    model.set_kernels("eager")
    try:
        yield
    finally:
        model._adopt(policy)


@contextmanager
def fit_for_fp64(model: nn.Module) -> Iterator[None]:
    """Eager attention and experts, where transformers would call kernels without fp64."""
    configs = _configs(model)
    attention = [c for c in configs if getattr(c, _ATTENTION, None) not in (None, "sdpa")]
    experts = [c for c in configs if getattr(c, _EXPERTS, None) is not None]
    with _eager(attention, _ATTENTION), _eager(experts, _EXPERTS):
        yield


def _configs(model: nn.Module) -> list[Any]:
    """transformers' configurations in the model, each once."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if isinstance(c, transformers.PretrainedConfig)]


@contextmanager
def _eager(configs: list[Any], attribute: str) -> Iterator[None]:
    before = [(config, getattr(config, attribute)) for config in configs]
    try:
        for config in configs:
            setattr(config, attribute, "eager")
        yield
    finally:
        for config, name in before:
            setattr(config, attribute, name)


def same_parameters(model: nn.Module, other: nn.Module) -> list[Check]:
    """A failed check for each parameter with other values.

    Raises ValueError for other names or shapes: there is nothing to compare then.
    """
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking:
        raise ValueError(
            f"verify: {len(lacking)} parameters are in one of the models only, such as "
            f"{lacking[:3]}; the reference must have the same ones by name"
        )
    for name, p in ours.items():
        if p.shape != theirs[name].shape or p.requires_grad != theirs[name].requires_grad:
            raise ValueError(
                f"verify: {name} is {tuple(p.shape)}, requires_grad={p.requires_grad}; in the "
                f"reference {tuple(theirs[name].shape)}, requires_grad="
                f"{theirs[name].requires_grad}: both must be the same"
            )
    return [
        Check("parameter", name, failure="has other values than in the reference")
        for name, p in ours.items()
        if p is not theirs[name] and not torch.equal(p.to(theirs[name].device), theirs[name])
    ]
