"""Whether Triton kernels can run here, and how they are launched cheaply.

`kernel[grid](...)` binds and specialises its arguments anew on every call. `Launcher` does that
once for each key and afterwards calls the compiled kernel itself. The key repeats what Triton
specialises on: dtypes, 16-byte alignment of pointers, integers that are 1 or divisible by 16.
Calls that it cannot describe (an unaligned pointer, an integer past 2^31) go the long way.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

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


class Launcher:
    """Launch one @triton.jit kernel whose parameters stand in the order of `__call__`'s groups."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        # Triton decides when a kernel is decorated, which is now; not to be asked at every launch
        self._interpreted = interpreting()

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        specialised: tuple[int, ...],
        plain: tuple[int | float, ...],
        constants: tuple[Hashable, ...],
        num_warps: int,
    ) -> None:
        """Run the kernel on the current device and stream.

        `specialised` are integers whose divisibility Triton may use, `plain` numbers named in
        do_not_specialize, `constants` the constexprs.
        """
        arguments = (*tensors, *specialised, *plain, *constants)
        key = None if self._interpreted else _key(tensors, specialised, plain, constants, num_warps)
        if key is None:
            self.kernel[grid](*arguments, num_warps=num_warps, **_OPTIONS)
            return
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, num_warps=num_warps, **_OPTIONS)
        else:
            compiled[grid](*arguments)


def _key(
    tensors: tuple[Tensor, ...],
    specialised: tuple[int, ...],
    plain: tuple[int | float, ...],
    constants: tuple[Hashable, ...],
    num_warps: int,
) -> Hashable | None:
    pointers = 0
    for t in tensors:
        pointers |= t.data_ptr()
        if _AMD and t.untyped_storage().nbytes() >= _LONG:
            return None  # Triton addresses smaller tensors with 32-bit offsets there
    if pointers & 15 or max(specialised) >= _LONG or max(plain) >= _LONG:
        return None
    return (
        tensors[0].device.index,
        constants,
        num_warps,
        tuple([t.dtype for t in tensors]),
        tuple([2 if i == 1 else int(i & 15 == 0) for i in specialised]),
    )
