"""Which patched modules a run served by our kernels, seen without touching any of them.

A hook would be seen by the module, which calls its own parts where they have hooks. So Python is
asked to tell of every call: where an op is called, the patched modules among the locals of its
callers, up to the first whose method that is, are those that it serves. The norms that a layer
joins with its sums are among them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn

from swathe.kernels.cross_entropy.api import cross_entropy
from swathe.kernels.gated_mlp_act.api import gated_mlp_act
from swathe.kernels.layer_norm.api import layer_norm
from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy
from swathe.kernels.norm.api import rms_norm
from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary
from swathe.kernels.rotary.api import rotary
from swathe.modeling.hf.patching.causal_loss import CausalLMLoss
from swathe.modeling.hf.patching.lazy_logits import LazyLogits
from swathe.modeling.hf.patching.swaps import fused_ops, is_fused

_OPS = (rms_norm, layer_norm, gated_mlp_act, rotary, qk_norm_rotary)
_LOSSES = (cross_entropy, linear_cross_entropy)
_CODES = {op.__code__ for op in (*_OPS, *_LOSSES)}


@dataclass
class Usage:
    """What was called while `observed` watched; `watched` is False where it could not."""

    watched: bool
    served: set[int] = field(default_factory=set)  # ids of modules and loss functions

    def unused(self, model: nn.Module) -> tuple[str, ...]:
        """`path (op)` of every patched module that no kernel served, in the model's order."""
        if not self.watched or not self.served:
            return ()
        found = []
        for path, module in model.named_modules():
            own = [(module, fused_ops(type(module))[-1])] if is_fused(type(module)) else []
            loss: Any = vars(module).get("_loss_function")
            if isinstance(loss, CausalLMLoss) and not loss.lazy:
                own.append((loss, cross_entropy.__name__))
            found += [
                f"{path or 'the model'} ({op})" for it, op in own if id(it) not in self.served
            ]
        return tuple(found)


@contextmanager
def observed() -> Iterator[Usage]:
    """See which patched modules and losses our ops serve, in this thread.

    Not where something else profiles Python calls already.
    """
    usage = Usage(sys.getprofile() is None)

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in _CODES:
            usage.served.update(map(id, _callers(frame.f_back)))

    if not usage.watched:
        yield usage
        return
    sys.setprofile(see)
    try:
        yield usage
    finally:
        sys.setprofile(None)


def _callers(frame: FrameType | None) -> Iterator[Any]:
    """What an op was called for: patched modules, or a loss and its head."""
    while frame is not None:
        values = list(_values(frame.f_locals.values()))
        yield from (value for value in values if is_fused(type(value)))
        yield from (value.head for value in values if isinstance(value, LazyLogits))
        own = frame.f_locals.get("self")
        if isinstance(own, CausalLMLoss):
            yield own
        if isinstance(own, CausalLMLoss) or is_fused(type(own)):
            return
        frame = frame.f_back


def _values(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value
