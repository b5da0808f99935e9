"""A model's own forward around its head, run on random hidden states, with our loss beside its own.

The model is taken apart for it: the same class and configuration, but a body that answers with
noise, and a head of fewer classes. So the proof costs nothing, whatever the model's size, and
covers what the forward does to logits before the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from swathe.modeling.hf.patching.causal_loss import FLAG, CausalLMLoss, lazy_class
from swathe.modeling.hf.patching.lazy_logits import LazyLogits
from swathe.modeling.hf.patching.prove import Call, prove
from swathe.modeling.hf.patching.report import Proof

# sizes and number of calls of a proof, and how large a part of the model may be that comes along
B, T, V, _CALLS = 1, 4, 96, 9
_SMALL = 2**20
_LOGITS = (1.0, 8.0, 0.1)  # sizes of logits: usual ones, those that a softcap bends, small ones


_proofs: dict[Hashable, Proof] = {}


def prove_loss(model: PreTrainedModel, head: str, *, lazy: bool, backend: str) -> Proof:
    """Loss and gradients of hidden states and head, beside the model's own; never raises.

    `head` is the name of its output embeddings. With `lazy`, a forward that makes the logits real
    before the loss fails. A proof holds for every model with the same class and numbers.
    """
    body = _body(model)
    linear: Any = model.get_submodule(head) if head else None
    weight = getattr(linear, "weight", None)
    if body is None or not isinstance(weight, Tensor):
        return Proof(inf, "", "its body and head cannot be told apart")
    K = getattr(linear, "in_features", weight.shape[-1])
    bias = getattr(linear, "bias", None) is not None
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    real = getattr(model, body)
    settings = model.config.to_json_string(use_diff=False), _numbers(model), _numbers(real)
    key = (type(model), settings, head, K, bias, dtype, weight.device, lazy, backend)
    if key not in _proofs:
        classes = min(V, model.config.get_text_config().vocab_size)
        where: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        parts = {head: nn.Linear(K, classes, bias=bias, **where), body: _Noise(real, K, **where)}
        light = _light(model, parts, classes)
        loss = CausalLMLoss(backend, lazy=lazy)
        _proofs[key] = _proven(_Probe(light, body), head, classes, loss)
    return _proofs[key]


def _proven(probe: _Probe, head: str, classes: int, loss: CausalLMLoss) -> Proof:
    counted = _Counted(loss)

    def fused(self: Any, labels: Tensor, size: float) -> Tensor:
        part: Any = self.model.get_submodule(head)
        self.model._loss_function = counted
        if loss.lazy:
            part.__class__ = lazy_class(nn.Linear)
            setattr(part, FLAG, True)
        try:
            return type(self).forward(self, labels, size)
        finally:
            del self.model._loss_function
            part.__class__ = nn.Linear

    device = probe.model.get_submodule(head).weight.device
    proof = prove(probe, fused, islice(_calls(classes, device), _CALLS))
    if loss.lazy and counted.real:
        return Proof(inf, "", "its forward needs the logits themselves")
    return proof


def _body(model: PreTrainedModel) -> str | None:
    """The name of the part that makes hidden states."""
    if model.base_model is not model:
        return model.base_model_prefix
    inner = _models_in(model)
    return inner[0] if len(inner) == 1 else None


def _models_in(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_children() if isinstance(part, PreTrainedModel)]


def _numbers(module: nn.Module) -> tuple[tuple[str, float], ...]:
    """What a forward may read off a module beside its parameters."""
    own = {k: v for k, v in vars(module).items() if isinstance(v, int | float) and k != "training"}
    return tuple(sorted(own.items()))


def _calls(classes: int, device: torch.device) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    for i in count():
        labels = torch.randint(classes, (B, T), generator=generator)
        labels[0, : i % T] = -100
        yield Call((labels.to(device), _LOGITS[i % len(_LOGITS)]))


class _Counted:
    """A loss that knows whether it was ever given real logits."""

    def __init__(self, loss: CausalLMLoss) -> None:
        self.loss, self.real = loss, False

    def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.real |= not isinstance(logits, LazyLogits) or logits.tensor is not None
        return self.loss(logits, *args, **kwargs)


@dataclass
class _States(ModelOutput):
    """What any body gives: hidden states, and None for whatever else is asked for."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Noise(nn.Module):
    """Stands for a model's body: a parameter, so that its gradient is compared.

    It has the body's numbers, and is what the body's own parts are.
    """

    def __init__(self, body: nn.Module, K: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(B, T, K, dtype=dtype, device=device))
        self.size = 1.0
        self.numbers, self.inner = dict(_numbers(body)), _models_in(body)

    def forward(self, *_: Any, **__: Any) -> _States:
        # the proof draws parameters of size 1 / sqrt(K)
        return _States(self.hidden * (self.size * self.hidden.shape[-1] ** 0.5))

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if name in own.get("numbers", ()):
            return own["numbers"][name]
        return self if name in own.get("inner", ()) else super().__getattr__(name)


class _Probe(nn.Module):
    def __init__(self, model: Any, body: str) -> None:
        super().__init__()
        self.model, self.body = model, body

    def forward(self, labels: Tensor, size: float) -> Tensor:
        model: Any = self.model
        getattr(model, self.body).size = size
        inputs = {model.main_input_name: labels.clamp(min=0), "labels": labels}
        loss: Tensor = type(model).forward(model, **inputs, return_dict=True).loss
        return loss


def _light(model: PreTrainedModel, parts: dict[str, nn.Module], classes: int) -> Any:
    """A copy of the model that shares everything but `parts` and its count of classes."""
    made: Any = model
    for path, part in parts.items():
        made = _replaced(made, path, part)
    made._modules = {
        name: part
        for name, part in made._modules.items()
        if part is None or sum(p.numel() for p in part.parameters()) <= _SMALL
    }
    made.__dict__.pop("_loss_function", None)
    made.config = _narrowed(model.config, classes)
    if "vocab_size" in vars(model):
        made.vocab_size = classes
    return made


def _replaced(module: nn.Module, path: str, part: nn.Module) -> Any:
    made: Any = object.__new__(type(module))
    made.__dict__.update(vars(module))
    name, _, rest = path.partition(".")
    inner = _replaced(module.get_submodule(name), rest, part) if rest else part
    made._modules = {**module._modules, name: inner}
    return made


def _narrowed(config: Any, classes: int) -> Any:
    made = copy.copy(config)
    if hasattr(made, "vocab_size"):
        made.vocab_size = classes
    if hasattr(made, "output_router_logits"):
        made.output_router_logits = False  # noise has none, and they take no part in this loss
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            setattr(made, name, _narrowed(value, classes))
    return made
