"""What is done to the zoo's models: ours, transformers' own as a yardstick, planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn

import swathe


@dataclass(frozen=True)
class Treatment:
    """`apply` changes a model and may say in a few words what it did; `undo` takes that back.

    `missing` says why it cannot be applied in this installation, None where it can.
    """

    name: str
    apply: Callable[[Any], str | None]
    undo: Callable[[Any], Any]
    runs: tuple[str, ...] = ("plain", "padded", "decode", "loss")
    missing: Callable[[], str | None] = lambda: None


def _attention(name: str) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        model.set_attn_implementation(name)

    return apply


def _ours(*path: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        name = "swathe.modeling.hf." + ".".join(path)
        for end in range(3, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            if find_spec(part) is None:
                return f"{part} is not there"
        return None

    return missing


def _swathe(model: Any) -> None:
    import_module("swathe.hf")  # registers the name
    model.set_attn_implementation("swathe")


def _summary(report: Any) -> str:
    return f"{len(report.patched)} patched, {len(report.left)} left"


def _patch(**options: Any) -> Callable[[Any], str]:
    def apply(model: Any) -> str:
        return _summary(swathe.patch(model, **options))

    return apply


def _unpatch(model: Any) -> None:
    swathe.unpatch(model)


def _triton(model: Any) -> str:
    import_module("swathe.hf")
    model.set_attn_implementation("triton")
    return _summary(swathe.patch(model, backend="triton"))


def _triton_undo(model: Any) -> None:
    swathe.unpatch(model)
    model.set_attn_implementation("eager")


def _norms(model: nn.Module) -> list[Any]:
    """Modules with "norm" in their class's name and a weight of one dimension."""
    return [
        module
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.dim() == 1
    ]


def _drop_weight(model: nn.Module) -> None:
    module = _norms(model)[-1]
    module._kept = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.fill_(float(module.weight.mean()))


def _drop_weight_undo(model: nn.Module) -> None:
    module = _norms(model)[-1]
    with torch.no_grad():
        module.weight.copy_(module.__dict__.pop("_kept"))


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _blind(model: Any) -> None:
    theirs = transformers.AttentionInterface()["sdpa"]
    transformers.AttentionInterface.register("blind", theirs)
    transformers.AttentionMaskInterface.register("blind", _no_mask)
    model.set_attn_implementation("blind")


def _detach(model: nn.Module) -> None:
    """The gradient of one weight vanishes."""
    module = _norms(model)[-1]
    cls = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = self._parameters.pop("weight")
        self.weight = held.detach()
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            del self.weight
            self._parameters["weight"] = held

    module.__class__ = type(cls.__name__, (cls,), {"forward": forward})


def _rename(model: nn.Module) -> None:
    """Another class of the same forward."""
    module = _norms(model)[-1]
    module.__class__ = type(type(module).__name__, (type(module),), {})


def _detach_undo(model: nn.Module) -> None:
    module = _norms(model)[-1]
    module.__class__ = type(module).__bases__[0]


def _nothing(_: Any) -> None:
    return None


NOT_LOSS = ("rms_norm", "layer_norm", "rope", "swiglu", "residual")
ONLY_LOSS = dict.fromkeys(NOT_LOSS, False)
LOSSES = _ours("patching", "losses")
TREATMENTS = {
    one.name: one
    for one in (
        Treatment("sdpa", _attention("sdpa"), _attention("eager")),
        Treatment("attention", _swathe, _attention("eager"), missing=_ours("attention")),
        Treatment("patch", _patch(), _unpatch, missing=_ours("patching", "patch")),
        Treatment("loss", _patch(**ONLY_LOSS), _unpatch, ("plain", "loss"), missing=LOSSES),
    )
}
# Every Triton kernel that a model has a place for; interpreted, this is for a few types alone.
TRITON = Treatment("triton", _triton, _triton_undo, missing=_ours("patching", "patch"))
# Mistakes that must be found, each with what it should be found by.
PLANTED = {
    one.name: one
    for one in (
        Treatment("norm weight dropped", _drop_weight, _drop_weight_undo),
        Treatment("mask ignored", _blind, _attention("eager")),
        Treatment("gradient gone", _detach, _detach_undo),
        Treatment("not undone", _rename, _nothing),
    )
}
