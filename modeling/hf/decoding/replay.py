"""Whether a step is the same calls on the same memory every time: what a CUDA graph can replay.

A graph replays kernels and no Python. A number of the host's that changes from step to step, a
tensor that one step makes and the next one reads, or a question to the device would be wrong in
it, or be refused. All of them show in the operators that a forward calls. `hindrance` decodes a few
tokens, records the operators of three steps at different lengths, and compares them:

    the same operators with the same numbers, on the same addresses of what was there before
    no answer read from the device, no number of the host's made a tensor, nothing on the host
    nothing that the prefill had made beside the cache: the next prefill makes it anew
    the logits that a growing cache gives

What this cannot see: kernels of others that are launched beside torch's dispatcher, and what a
model would do otherwise only later than in these steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swathe.modeling.generation import graph
from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.generation.step import last_logits

aten = torch.ops.aten
ROWS, ROOM = 2, 64
PROMPTS = (3, 5)  # tokens of the prompts that steps follow
_ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_BESIDE = (str(Path(torch.__file__).parent), __file__)


def hindrance(model: Any) -> str | None:
    """Why a graph could not replay the steps of a model (decoding/stock.py); None if it could."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _Trial(model).reason()
    except Exception as error:  # noqa: BLE001  (whatever a forward raises is the reason)
        text = str(error).strip().split("\n")[0][:200]
        return f"it fails with a cache of fixed room ({type(error).__name__}: {text})"
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class _Trial:
    """A few tokens through a model, over a cache of fixed room and over one that grows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        vocab = model.config.vocab_size
        self.ids = torch.arange(1, ROWS * ROOM + 1, device=model.device).view(ROWS, ROOM) % vocab
        self.mask = torch.ones_like(self.ids)
        self.mask[1, 0] = 0  # padding on the left
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.token = self.ids[:, :1].clone()
        self.prompt = Prompt.of(self.ids, self.mask)
        self.cache = model.new_cache(self.prompt, ROOM)

    def reason(self) -> str | None:
        self._prefill(self.cache, PROMPTS[0])  # what is made once, and kept, is made here
        self.logits = last_logits(self.model, self.token, self.cache)
        steps = [*self._watched(PROMPTS[0], 2), *self._watched(PROMPTS[1], 1)]
        for step in steps:
            if reason := step.reason or same(steps[0].calls, step.calls):
                return reason
        if self._close(self.logits, PROMPTS[1] + 1):
            return None
        return "its logits over a cache of fixed room are not those over its own"

    def _watched(self, T: int, steps: int) -> list[Watching]:
        """Records of so many steps after a prefill of T tokens."""
        self.cache.reset()
        with Watching(self.model.device) as prefill:
            self._prefill(self.cache, T)
        recorded = []
        for t in range(T, T + steps):
            self.token.copy_(self.ids[:, t : t + 1])
            with Watching(self.model.device, frozenset(prefill.made)) as step:
                self.logits = last_logits(self.model, self.token, self.cache)
            recorded.append(step)
        return recorded

    def _prefill(self, cache: Any, T: int) -> Tensor:
        given = (self.mask[:, :T], self.positions[:, :T])
        return last_logits(self.model, self.ids[:, :T], cache, *given)

    def _close(self, logits: Tensor, T: int) -> bool:
        """Whether a growing cache gives the same after T tokens, to half of the digits."""
        cache = self.model.new_cache(self.prompt, None)
        self._prefill(cache, T - 1)
        given = (self.mask[:, :T], self.positions[:, T - 1 : T])
        wanted = last_logits(self.model, self.ids[:, T - 1 : T], cache, *given).double()
        off = (logits.double() - wanted).norm() / wanted.norm()
        return bool(off < torch.finfo(logits.dtype).eps ** 0.5)


class Call(NamedTuple):
    """An operator, its arguments with names in place of tensors, and the line that called it."""

    function: Any
    arguments: tuple[Any, ...]
    place: tuple[str, int]

    @property
    def line(self) -> str:
        """The place, for people."""
        return f"{Path(self.place[0]).name}:{self.place[1]}"


class Watching(TorchDispatchMode):
    """Records operators, and the first `reason` why a graph could not hold them.

    `device` is the model's; `fleeting` are addresses that a graph cannot count on.
    """

    def __init__(self, device: torch.device, fleeting: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.device, self.fleeting = device, fleeting
        self.reads = device.type not in graph.CAPTURING  # where no graph is, anything may be read
        self.calls: list[Call] = []
        self.made: dict[int, int] = {}
        self.reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = _leaves((args, kwargs or {}))
        constant = func is aten.lift_fresh.default
        named = (leaf.tolist() if constant else self._named(leaf) for leaf in leaves)
        call = Call(func, tuple(named), _place())
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        new = [t for t in _leaves(out) if isinstance(t, Tensor)]
        if self.reason is None:
            reason = self._why_not(func, args, given, new)
            self.reason = reason and f"{reason}, in {call.line}"
        known = {_address(t) for t in given if not constant}
        self.made |= {_address(t): len(self.calls) for t in new if _address(t) not in known}
        self.calls.append(call)
        return out

    def _named(self, leaf: Any) -> Any:
        """A tensor by its layout, and the call that made it or else its address."""
        if not isinstance(leaf, Tensor):
            return leaf
        address = _address(leaf)
        name = ("made", self.made[address]) if address in self.made else ("held", address)
        return (*name, leaf.dtype, leaf.storage_offset(), leaf.size(), leaf.stride())

    def _why_not(self, func: Any, args: Any, given: list[Tensor], new: list[Tensor]) -> str | None:
        asks = not _ASKING.isdisjoint(func.tags)
        if func is aten.index.Tensor:
            asks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if asks and not self.reads:
            return f"it asks the device ({func})"
        if func is aten.lift_fresh.default and not self.reads:
            return "it makes a number of the host's a tensor"
        if any(t.device.type != self.device.type for t in (*given, *new)):
            return f"it computes on another device ({func})"
        if any(_address(t) in self.fleeting for t in given if _address(t) not in self.made):
            return "it reads what its prefill made beside the cache"
        return None


def same(one: list[Call], other: list[Call]) -> str | None:
    """The first difference of two steps; None where they are the same."""
    for a, b in zip(one, other, strict=False):
        if a.function is not b.function or a.arguments != b.arguments:
            return f"its steps differ: {a.function} in {a.line}"
    if len(one) != len(other):
        return f"its steps differ: {len(one)} operators, then {len(other)}"
    return None


def _leaves(tree: Any) -> list[Any]:
    """What stands in an operator's arguments, names of keywords included."""
    if isinstance(tree, dict):
        return [leaf for item in tree.items() for leaf in _leaves(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [tree]


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _place() -> tuple[str, int]:
    """The file and the line of a model's code that is running."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BESIDE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
