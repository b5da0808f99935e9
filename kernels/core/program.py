"""Programs: calls into the C++ library, noted while Python runs, and run again in one call.

While `recording`, launchers of backend "cpp" note their packed arguments and compute nothing; what
they return is memory that the program fills whenever it runs. So Python is paid for once. Only such
calls, views and new memory may occur meanwhile: anything else would read memory that nothing has
filled, and raises NotRecordable.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swathe.kernels.core.cpp import address_of, call, entry, noting
from swathe.kernels.core.op import operator

_STEP, _COUNT = Struct("=Qq"), Struct("=q")
_APPEND = Struct("=3Q10q")
_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty"}
_VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
_FACTS = {"promote_types"}


class NotRecordable(Exception):
    """A torch operator would have computed while a program was recorded."""


class Program:
    """Steps of the C++ library on fixed memory, which it keeps alive."""

    def __init__(self) -> None:
        self.steps: list[bytes] = []
        self.kept: list[Any] = []
        self._packed = b""

    def run(self) -> None:
        """Every step in its order. Raises MemoryError where one had no scratch memory."""
        if not self._packed:
            self._packed = _COUNT.pack(len(self.steps)) + b"".join(self.steps)
        if entry("swathe_run")(self._packed):
            raise MemoryError("a recorded program found no memory for its scratch rows")


class _OnlyPlaces(TorchDispatchMode):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "swathe" and func._overloadname == "cpp":
            with self:  # what a launcher allocates is kept, what it copies is refused
                return operator(f"{name}.{func._overloadname}").launch(*args)
        if name not in _MEMORY | _VIEWS | _FACTS:
            raise NotRecordable(f"{func} computes, which a program of the C++ library cannot hold")
        found = func(*args, **(kwargs or {}))
        self.program.kept.append(found)
        return found


@contextmanager
def recording() -> Iterator[Program]:
    """A program of the calls that backend "cpp" is given inside, in this thread.

    Raises NotRecordable, from whatever torch operator would compute.
    """
    program = Program()

    def note(name: str, packed: bytes) -> None:
        program.steps.append(_STEP.pack(address_of(name), len(packed)) + packed)

    with torch.no_grad(), noting(note), _OnlyPlaces(program):
        yield program


def append(x: Tensor, cache: Tensor, position: array[int]) -> None:
    """cache[:, :, p : p + T] = x for x (B, H, T, D), p being what `position` holds at that time."""
    B, H, T, D = x.shape
    size = x.element_size()
    by = (size * n for t in (x, cache) for n in t.stride()[:3])
    at, _ = position.buffer_info()
    packed = _APPEND.pack(x.data_ptr(), cache.data_ptr(), at, B, H, T, D * size, *by)
    call("swathe_append", packed)
