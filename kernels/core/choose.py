"""From a call to the function that serves it: an op's choices, kept by the facts of a call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.registry import Choice, on_change, resolve
from swathe.kernels.core.spec import Spec


class Chooser:
    """Chooses for one op; `features` names the op's own facts, in the order they are given in."""

    def __init__(self, op: str, *features: str) -> None:
        self._op, self._features = op, features
        self._choices: dict[tuple[Hashable, ...], Choice] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        on_change(self._choices.clear)

    def choose(self, x: Tensor, asked: str, size: int, grad: bool, *features: Hashable) -> Choice:
        """The backend for tensors like `x`; raises what `resolve` raises."""
        return self._resolve((x.device, x.dtype, asked, size, grad, *features), compiled=False)

    def call_for(
        self, x: Tensor, asked: str | Choice, size: int, grad: bool, *features: Hashable
    ) -> Callable[..., Any]:
        """The function to call; a Choice made earlier is only held to its devices."""
        if isinstance(asked, Choice):
            if x.device.type not in asked.devices:
                raise ValueError(
                    f"{self._op}: the input is on {x.device}, but backend {asked.backend!r} was "
                    f"chosen for {sorted(asked.devices)}; choose again for this device"
                )
            return asked.call
        if torch.compiler.is_compiling():
            # a dict's keys are numbers, never symbols: rows may vary in a graph, features do not
            facts = [next(iter({fact: None})) for fact in (size, *features)]
            key = (x.device, x.dtype, asked, facts[0], grad, *facts[1:])
            return self._calls[self._name_while_tracing(key)]
        key = (x.device, x.dtype, asked, int(size), grad, *features)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._resolve(key, compiled=False)
        return choice.call

    def _name_while_tracing(self, key: tuple[Any, ...]) -> str:
        # a graph being traced can hold a name as a constant, but not a Choice
        choice = self._resolve(key, compiled=True)
        self._calls[choice.backend] = choice.call
        return choice.backend

    # what torch.compiler.assume_constant_result sets, without its import of the whole of dynamo
    _name_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _resolve(self, key: tuple[Any, ...], compiled: bool) -> Choice:
        device, dtype, asked, size, grad, *features = key
        named = dict(zip(self._features, features, strict=True))
        spec = Spec.on(self._op, device, dtype, size=size, grad=grad, compiled=compiled, **named)
        return resolve(spec, asked)
