"""Decode steps captured in CUDA graphs: a step then costs one launch, whatever the model's size.

A graph repeats kernels on the addresses and sizes of its capture, and no Python. So the captured
step lives with its buffers and its cache and is kept for later calls, by rows, room and Policy; it
serves any prompts and lengths within. Room is a multiple of ROOM, so that calls of similar lengths
share a graph. What a step took from the model (addresses, backends, modes, hooks) is compared
before each call, and all graphs of a model that has changed are dropped.

Memory  the last KEPT graphs of a model keep their caches; `forget_graphs` frees them. What kernels
        write besides is shared by the graphs of a model, since none needs it after its step. So
        calls of a model may follow each other on any streams, but not run on several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.generation.step import DecodeStep, Policy
from swathe.modeling.layers.grouped import has_kernel
from swathe.modeling.layers.moe import Experts

CAPTURING = ("cuda",)  # types of devices that have graphs
KEPT = 4
ROOM = 256
WARM_UPS = 2  # steps before a capture: kernels are compiled, and buffers made, by the first


def captures(asked: bool | Literal["auto"], model: Any, cache: str | None) -> bool:
    """Whether to decode with a graph; "auto" does where it can.

    Raises ValueError for True where something is in the way, and for other values.
    """
    if type(asked) is not bool and asked != "auto":
        raise ValueError(f"cuda_graph={asked!r}; allowed: 'auto', True, False")
    reason = hindrance(model, cache) if asked else None
    if reason is not None and asked is True:
        raise ValueError(
            f"cuda_graph=True: {reason}; or pass cuda_graph='auto', which captures where it can"
        )
    return bool(asked) and reason is None


def hindrance(model: Any, cache: str | None) -> str | None:
    """Why a step of this model cannot be captured, and what would help."""
    if cache != "static":
        return f"cache_implementation={cache!r} is no cache of fixed addresses; pass 'static'"
    devices = {p.device for p in model.parameters()}
    kinds = {device.type for device in devices}
    if not kinds <= {*CAPTURING}:
        return f"the model is on {', '.join(sorted(kinds))}, and only {CAPTURING} have graphs"
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices, and a graph serves one"
    wrapped = {type(p).__name__ for p in model.parameters() if is_traceable_wrapper_subclass(p)}
    if wrapped:
        return f"weights are wrapped in {sorted(wrapped)}, whose addresses are not known"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_autocast_enabled(next(iter(kinds))):
        return "torch.autocast casts weights anew in each call; cast the model with .to instead"
    for name, module in model.named_modules():
        if isinstance(module, Experts) and not all(
            has_kernel(weight, weight) for weight in (module.gate_up_proj, module.down_proj)
        ):
            return (
                f"{name} asks the device how many tokens each expert has; torch's grouped kernel, "
                "which does not, needs bfloat16 weights with rows of a multiple of 16 bytes"
            )
    reason: str | None = model.why_uncaptured()
    return reason


@contextmanager
def decoding(
    model: Any,
    policy: Policy,
    prompt: Prompt,
    room: int,
    generator: torch.Generator | None,
    cache: str | None,
    cuda_graph: bool,
) -> Iterator[tuple[DecodeStep, Callable[[], None]]]:
    """A step for the rows of `prompt`, and what runs it: the step itself, or a graph's replay."""
    if not cuda_graph:
        held = model.new_cache(prompt, room) if cache == "static" else None
        step = DecodeStep(policy, prompt, room, generator, held)
        yield step, lambda: step(model)
        return
    # buffers made in inference mode could not be written to outside of it
    with torch.inference_mode(False), torch.no_grad():
        graphs = _graphs.setdefault(model, _Graphs())
        room = -(-room // ROOM) * ROOM
        captured = graphs.pop(model, policy, prompt, room)
        with captured.drawing_from(generator):
            yield captured.step, captured.graph.replay
        graphs.keep(captured)


def forget_graphs(model: Any) -> None:
    """Free the graphs of a model, and their caches."""
    _graphs.pop(model, None)


class _Captured:
    """A step and its graph. It draws from a generator of its own, which stands in for any other."""

    def __init__(
        self, key: tuple[Any, ...], model: Any, policy: Policy, prompt: Prompt, room: int, pool: Any
    ) -> None:
        self.key = key
        self.device = prompt.ids.device
        generator = torch.Generator(self.device)
        cache = model.new_cache(prompt, room)
        self.step = DecodeStep(policy, prompt, room, generator, cache)
        # a buffer of the model may remember its longest input
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            self.graph = self._capture(model, pool)
        except RuntimeError as error:
            error.add_note("While capturing a step of generate; cuda_graph=False needs no capture.")
            raise
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def _capture(self, model: Any, pool: Any) -> Any:
        step, current = self.step, torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step(model)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(step.generator)
        # other threads may go on using the device meanwhile
        with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
            step(model)
        return graph

    @contextmanager
    def drawing_from(self, given: torch.Generator | None) -> Iterator[None]:
        """Draw the numbers that `given`, or the device's own generator, would have given."""
        own, source = self.step.generator, _default(self.device) if given is None else given
        assert own is not None
        own.set_state(source.get_state())
        try:
            yield
        finally:
            source.set_state(own.get_state())


class _Graphs:
    """The captured steps of one model, the last used one last."""

    def __init__(self) -> None:
        self.facts: tuple[Any, ...] = ()
        self.kept: dict[tuple[Any, ...], _Captured] = {}
        self.done: Any = None

    def pop(self, model: Any, policy: Policy, prompt: Prompt, room: int) -> _Captured:
        """A captured step, which is no other call's while this one uses it."""
        now = facts(model)
        if now != self.facts:
            self.kept.clear()
            self.facts = now
        if self.done is not None:
            # the last call may have used another stream
            torch.cuda.current_stream(prompt.ids.device).wait_event(self.done)
        precision = torch.get_float32_matmul_precision()
        key = (prompt.ids.shape[0], room, policy, prompt.holes, precision)
        if key in self.kept:
            return self.kept.pop(key)
        # memory is shared with a graph that is alive: what the last one leaves is freed
        pool = next((held.graph.pool() for held in self.kept.values()), None)
        return _Captured(key, model, policy, prompt, room, pool)

    def keep(self, captured: _Captured) -> None:
        """Keep a step for later calls; the one that was not used for longest gives way."""
        self.done = torch.cuda.current_stream(captured.device).record_event()
        self.kept[captured.key] = captured
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]


# a graph holds addresses of its model and no reference to it
_graphs: WeakKeyDictionary[Any, _Graphs] = WeakKeyDictionary()


def facts(model: Any) -> tuple[Any, ...]:
    """What a step takes from a model once and for all."""
    tensors = chain(model.parameters(), model.buffers())
    where = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
    what = [
        (type(m), m.training, getattr(m, "choice", None), *m._forward_pre_hooks, *m._forward_hooks)
        for m in model.modules()
    ]
    return *where, *what, *model.step_settings()


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator
