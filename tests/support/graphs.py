"""CUDA graphs where there is no GPU: a double that records a step's operators and repeats them.

As on a GPU, a capture changes nothing, and a replay runs no Python of ours: every operator is
called again on the addresses that it was recorded with, and what it made at the capture is written
to where that lay. So a number that the host baked in, or a buffer that was made anew, gives wrong
tokens here as well. What a GPU refuses while it captures, or would only do wrong, raises:

    questions to the device     .item(), .tolist(), bool(tensor), shapes that depend on values
    numbers from the host       torch.tensor(...)
    memory that is gone         a storage from before the capture that nobody held until the replay
    a stranger's random numbers a generator that was not registered with the graph
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from support.families import tokens
from swathe.modeling import forward
from swathe.modeling.generation import graph as graph_module

aten = torch.ops.aten
NEW = 64  # tokens that a step is repeated for
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 1, 0, 0]])


class Refused(RuntimeError):
    """A capture, or a replay, that a GPU would not do."""


class Outside(NamedTuple):
    """A tensor from before the capture, by address: the graph does not keep it alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    layout: tuple[Any, ...]

    @classmethod
    def of(cls, t: Tensor) -> Outside:
        layout = (t.storage_offset(), t.size(), t.stride())
        return cls(StorageWeakRef(t.untyped_storage()), t.dtype, layout)

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise Refused("the graph uses memory that was freed after its capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Call(NamedTuple):
    """One operator: arguments with Outside for tensors, and what it made, None for views."""

    function: Any
    arguments: Any
    made: list[Tensor | None]


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The arguments of an operator, or what it made; torch's own of this is slow."""
    if type(tree) is dict:
        return {name: _map(function, item) for name, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map(function, item) for item in tree)
    return function(tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, tree)
    return found


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _identity(generator: Any) -> int:
    # operators are given a new object for the same generator
    return generator._cdata


class Graph:
    """torch.cuda.CUDAGraph, on a CPU."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.generators: list[torch.Generator] = []
        self.replays = 0
        self.memory: Any = None

    def pool(self) -> Any:
        return self.memory

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            args, kwargs = _map(
                lambda leaf: leaf.tensor() if isinstance(leaf, Outside) else leaf, call.arguments
            )
            out = call.function(*args, **kwargs)
            for before, now in zip(call.made, _tensors(out), strict=True):
                if before is not None:
                    before.copy_(now)


class Recording(TorchDispatchMode):
    """Fills a Graph with the operators that are called, and undoes what they change."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.inside: set[int] = set()  # storages made since the capture began; calls hold them
        self.before: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Recording:
        self.states = [
            (g, g.get_state()) for g in (*self.graph.generators, torch.default_generator)
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, bytes_before in self.before.values():
            storage.copy_(bytes_before)
        for generator, state in self.states:
            generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._refuse(func, args, kwargs)
        self._remember(func, args)
        given = {_address(t) for t in _tensors((args, kwargs))}
        arguments = _map(self._argument, (args, kwargs))
        out = func(*args, **kwargs)
        made: list[Tensor | None] = []
        for t in _tensors(out):
            new = _address(t) not in given | self.inside
            made.append(t if new else None)
            self.inside |= {_address(t)} if new else set()
        self.graph.calls.append(Call(func, arguments, made))
        return out

    def _argument(self, leaf: Any) -> Any:
        outside = isinstance(leaf, Tensor) and _address(leaf) not in self.inside
        return Outside.of(leaf) if outside else leaf

    def _refuse(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        asks = torch.Tag.data_dependent_output in func.tags
        if func is aten.index.Tensor:
            asks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        elif torch.Tag.dynamic_output_shape in func.tags:
            asks = True
        if asks:
            raise Refused(f"{func} asks the device while a graph is captured")
        if func is aten.lift_fresh.default:
            raise Refused("a number of the host's becomes a tensor while a graph is captured")
        generator = kwargs.get("generator")
        known = [_identity(own) for own in self.graph.generators]
        if generator is not None and _identity(generator) not in known:
            raise Refused(f"{func} draws from a generator that the graph does not know")

    def _remember(self, func: Any, args: Any) -> None:
        for schema, value in zip(func._schema.arguments, args, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write:
                for t in _tensors(value):
                    storage = t.untyped_storage()
                    if storage._cdata not in self.inside and storage._cdata not in self.before:
                        self.before[storage._cdata] = storage, storage.clone()


@contextmanager
def recorded(
    graph: Graph, pool: Any, stream: Any, capture_error_mode: str = "global"
) -> Iterator[None]:
    """torch.cuda.graph, on a CPU."""
    graph.memory = object() if pool is None else pool
    with pytest.MonkeyPatch.context() as patch, Recording(graph):
        # ids of a CPU are looked at, those of a GPU never
        patch.setattr(forward, "_within", lambda ids, vocab_size: True)
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Let generate capture on the CPU; returns the list of the graphs that it will make."""
    graphs: list[Graph] = []

    class Made(Graph):
        def __init__(self) -> None:
            super().__init__()
            graphs.append(self)

    def nothing(*_: Any) -> None:
        pass

    class Stream:
        def __init__(self, *_: Any) -> None:
            self.wait_stream = self.wait_event = nothing
            self.record_event = object

    doubles: dict[str, Callable[..., Any]] = {
        "CUDAGraph": Made,
        "graph": recorded,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(graph_module, "CAPTURING", ("cpu",))
    return graphs


def drawn(model: Any, seed: int | None = 3, **options: Any) -> Tensor:
    """Tokens of a call on a ragged batch; `seed` None draws from the device's own generator."""
    prompt = tokens(3, 7)
    prompt[MASK == 0] = 0
    if options.get("do_sample") and seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "attention_mask": MASK, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": [],
        "cache_implementation": "static",
    }  # fmt: skip
    return model.generate(prompt, **{**given, **options})
