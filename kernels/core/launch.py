"""Whether Triton kernels can run here, and how they are launched cheaply.

`kernel[grid](...)` binds and specialises its arguments anew on every call. `Launcher` does that
once for each key and afterwards calls the compiled kernel's C entry itself. The key repeats what
Triton specialises on: dtypes, 16-byte alignment of pointers, integers that are 1 or divisible by
16. Calls that it cannot describe (an unaligned pointer, an integer past 2^31) and calls that a
profiler's hook wants to see go the long way.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from swathe.kernels.core.device import interpreting

_LONG = 2**31
# a * b + c in one rounding: said aloud, because Triton's default for it is about to change
_OPTIONS = {"enable_fp_fusion": True}
_AMD = torch.version.hip is not None


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    """Why Triton cannot be used in this installation, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv costs 3 us a call outside kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


class Launcher:
    """Launch one kernel of Triton or Gluon, whose parameters stand as `__call__`'s groups do."""

    _made: ClassVar[WeakSet[Launcher]] = WeakSet()
    launching: ClassVar[bool] = True  # False: kernels are compiled for a GPU that is not here

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._made.add(self)
        self._compiled: dict[Hashable, Any] = {}
        # Triton decides when a kernel is decorated, which is now; not to be asked at every launch
        self._interpreted = interpreting()
        self._knobs = import_module("triton.knobs")
        self._driver = import_module("triton.runtime").driver

    @classmethod
    def forget(cls) -> None:
        """Drop every compiled kernel: they belong to the driver that was active at first launch."""
        for launcher in cls._made:
            launcher._compiled.clear()

    @classmethod
    def compiled_count(cls) -> int:
        """Compiled kernels that launchers hold, over all devices."""
        return sum(len(launcher._compiled) for launcher in cls._made)

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        specialised: tuple[int, ...],
        plain: tuple[int | float, ...],
        constants: tuple[Hashable, ...],
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int | None = None,
    ) -> None:
        """Run the kernel on the current device and stream.

        `tensors` begin with a Tensor; others may be None, which the kernel is specialised for, or
        a TensorDescriptor of the kernel's language. `specialised` are integers whose divisibility
        Triton may use, `plain` numbers named in do_not_specialize, `constants` the constexprs.
        `maxnreg` are the registers that a thread starts with where warps specialise.
        """
        arguments = (*tensors, *specialised, *plain, *constants)
        shape = (num_warps, num_stages, maxnreg)
        key = None if self._interpreted else _key(tensors, specialised, plain, constants, shape)
        compiled = None if key is None else self._compiled.get(key)
        if compiled is None:
            options = {"num_warps": num_warps, "num_stages": num_stages, **_OPTIONS}
            if maxnreg is not None:
                options["maxnreg"] = maxnreg  # not said at all where it is not meant: AMD has none
            if not self.launching:
                self.kernel.warmup(*arguments, grid=grid, **options)
                return
            compiled = self.kernel[grid](*arguments, **options)
            if key is not None:
                self._compiled[key] = compiled
            return
        hooks = self._knobs.runtime
        if _called(hooks.launch_enter_hook) or _called(hooks.launch_exit_hook):
            compiled[grid](*arguments)
            return
        # what compiled[grid] does, less the metadata that only hooks read
        stream = self._driver.active.get_current_stream(tensors[0].device.index)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )


def _called(hook: Any) -> bool:
    # a chain of hooks; whatever else a user put in its place is called as well
    return hook is not None and bool(getattr(hook, "calls", True))


def _key(
    tensors: tuple[Any, ...],
    specialised: tuple[int, ...],
    plain: tuple[int | float, ...],
    constants: tuple[Hashable, ...],
    shape: tuple[int, int, int | None],
) -> Hashable | None:
    pointers = 0
    types: list[Hashable] = []
    for t in tensors:
        if isinstance(t, Tensor):
            pointers |= t.data_ptr()
            types.append(t.dtype)
            if _AMD and t.untyped_storage().nbytes() >= _LONG:
                return None  # Triton addresses smaller tensors with 32-bit offsets there
        else:
            # only Gluon's descriptors say how a box lies in shared memory
            layout = None if t is None else getattr(t, "layout", None)
            types.append(None if t is None else (t.base.dtype, *t.block_shape, layout))
    if pointers & 15 or max(specialised) >= _LONG or max(plain) >= _LONG:
        return None
    return (
        tensors[0].device.index,
        constants,
        shape,
        tuple(types),
        tuple([2 if i == 1 else int(i & 15 == 0) for i in specialised]),
    )
