"""What a kernel may not do, watched while it is interpreted.

    out of bounds     a load, store or atomic outside every tensor argument (exact, to the byte)
    undefined lanes   a masked load without `other` gives NaN (floats) or all ones (integers)
    races             two programs store to one address, or one loads what another stores
    duplicate stores  one store instruction that writes an address twice
    overflow          int32 arithmetic that wraps, when asked for
    false hints       tl.multiple_of (of a scalar or a block's first element) and tl.max_contiguous
                      (of a 1-D block) that do not hold
    grid limits       more programs on an axis than hardware takes

Not seen: a wrong address inside another live tensor, reads in the gaps of a strided view, races
between the threads of one program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter as stock

from support.numerics import Builder, Handle, SanitizerError

GRID_LIMITS = (2**31 - 1, 65_535, 65_535)


@dataclass
class Watch:
    """Switches of the sanitizer, and what it counted since they were set."""

    bounds: bool = True
    races: bool = True
    order: str = "forward"  # or "reverse", "random": the order in which programs run
    seed: int = 0
    launches: int = 0
    programs: int = 0
    atomics: int = 0
    _low: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    _high: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    _touched: list[tuple[str, np.ndarray, int, int]] = field(default_factory=list)
    _program: int = 0

    def begin(self, arguments: list[Any]) -> None:
        """Start a launch: note where its tensor arguments lie."""
        self.launches += 1
        self._touched = []
        spans = sorted(_span(t) for t in arguments if isinstance(t, torch.Tensor) and t.numel())
        merged: list[list[int]] = []
        for low, high in spans:
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self._low = np.array([low for low, _ in merged], np.uint64)
        self._high = np.array([high for _, high in merged], np.uint64)

    def enter(self, program: int) -> None:
        """Say which program runs from now on."""
        self.programs += 1
        self._program = program

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Check one access of `size` bytes for each live lane."""
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        live = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)]
        if not live.size:
            return
        if self.bounds:
            self._check_bounds(kind, live, size)
        if kind == "store" and np.unique(live).size != live.size:
            raise SanitizerError(f"program {self._program} writes an address twice in one store")
        if self.races:
            self._touched.append((kind, live, size, self._program))

    def _check_bounds(self, kind: str, live: np.ndarray, size: int) -> None:
        if not self._low.size:
            raise SanitizerError(f"out of bounds {kind}: the launch has no tensor argument")
        at = np.searchsorted(self._low, live, "right").astype(np.int64) - 1
        bad = (at < 0) | (live + np.uint64(size) > self._high[np.maximum(at, 0)])
        if bad.any():
            first = int(live[bad][0])
            past = first - int(self._high[max(int(at[bad][0]), 0)])
            raise SanitizerError(
                f"out of bounds {kind} in program {self._program}: {int(bad.sum())} lanes, "
                f"the first {past} bytes past the end of the nearest argument"
            )

    def end(self) -> None:
        """Finish a launch: look for addresses that two programs touched, one of them writing."""
        if not self.races or all(kind == "load" for kind, *_ in self._touched):
            return
        written, owner, plain = self._gather(("store", "atomic"))
        order = np.lexsort((owner, written))
        written, owner, plain = written[order], owner[order], plain[order]
        # two atomics on one address are no race
        clash = (written[1:] == written[:-1]) & (owner[1:] != owner[:-1])
        clash &= plain[1:] | plain[:-1]
        if clash.any():
            pair = owner[:-1][clash][0], owner[1:][clash][0]
            raise SanitizerError(f"race: programs {pair[0]} and {pair[1]} store to one address")
        loaded, reader, _ = self._gather(("load",))
        at = np.minimum(np.searchsorted(written, loaded), written.size - 1)
        hit = (written[at] == loaded) & (owner[at] != reader)
        if hit.any():
            pair = reader[hit][0], owner[at][hit][0]
            raise SanitizerError(f"race: program {pair[0]} loads what program {pair[1]} stores")

    def _gather(self, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # in units of the launch's smallest element, so that accesses of other widths meet
        unit = min(size for _, _, size, _ in self._touched)
        addresses, owners, plain = [np.empty(0, np.uint64)], [np.empty(0, int)], [np.empty(0, bool)]
        for kind, live, size, program in self._touched:
            if kind in kinds:
                steps = np.arange(0, size, unit, dtype=np.uint64)
                addresses.append((live[:, None] + steps).reshape(-1))
                owners.append(np.full(addresses[-1].size, program))
                plain.append(np.full(addresses[-1].size, kind != "atomic"))
        return np.concatenate(addresses), np.concatenate(owners), np.concatenate(plain)


watch = Watch()


def _span(t: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
    element = pointers.get_element_ty()
    dtype = stock._get_np_dtype(element)
    watch.access("load", pointers.data, mask.data, dtype.itemsize)
    if other is None:
        undefined = np.zeros(pointers.data.shape, dtype)
        if not mask.data.all():
            undefined.view(np.uint8).fill(0xFF)
        other = Handle(undefined, element)
    loaded = stock._interpreter.load(pointers.data, mask.data, other.data, dtype)
    return Handle(loaded, element)


def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
    watch.access("store", pointers.data, mask.data, value.data.itemsize)
    return stock._interpreter.store(pointers.data, value.data, mask.data)


_atomic_rmw = Builder.create_atomic_rmw


def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    watch.access("atomic", pointers.data, mask.data, value.data.itemsize)
    watch.atomics += 1
    return _atomic_rmw(self, op, pointers, value, mask, *rest)


_atomic_cas = Builder.create_atomic_cas


def create_atomic_cas(self: Any, pointers: Any, expected: Any, value: Any, *rest: Any) -> Any:
    everywhere = np.ones(pointers.data.shape, bool)
    watch.access("atomic", pointers.data, everywhere, value.data.itemsize)
    watch.atomics += 1
    return _atomic_cas(self, pointers, expected, value, *rest)


def max_contiguous(x: Any, values: Any) -> Any:
    """tl.max_contiguous, checked for blocks of one dimension."""
    first = values[0] if isinstance(values, (list, tuple)) else values
    run = int(getattr(first, "value", first))
    if hasattr(x, "handle") and x.handle.data.ndim == 1 and x.handle.data.size % run == 0:
        groups = x.handle.data.reshape(-1, run).astype(np.int64)
        if (np.diff(groups, axis=1) != 1).any():
            raise SanitizerError(f"tl.max_contiguous({run}) is false")
    return x


def multiple_of(x: Any, values: Any) -> Any:
    """tl.multiple_of, checked instead of believed."""
    first = values[0] if isinstance(values, (list, tuple)) else values
    factor = int(getattr(first, "value", first))
    if hasattr(x, "handle"):
        data = x.handle.data
        if data.ndim <= 1 and data.size and int(data.reshape(-1)[0]) % factor:
            raise SanitizerError(f"tl.multiple_of({factor}) is false: {int(data.reshape(-1)[0])}")
    return x


def install() -> None:
    """Put the checks into the interpreter, once for the process."""
    Builder.create_masked_load = create_masked_load
    Builder.create_masked_store = create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw
    Builder.create_atomic_cas = create_atomic_cas
