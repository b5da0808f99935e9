"""Which backends an op has, which one serves a call, and why the others do not.

A backend is registered once with its capability record. `resolve` is called when a module is
built or switched, never inside its forward: it returns a `Choice` that holds the function to call.
A backend asked for by name serves or raises; "auto" walks the op's preference table and keeps the
reasons for which it passed others over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature, did_you_mean
from swathe.kernels.core.spec import Capabilities, Spec

AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    `load()` returns the function that the op's api calls; it is run once, when the backend is
    first chosen, and is the place to import what the backend needs. `missing()` says why this
    installation cannot run the backend at all, or None. `limits(spec)` adds reasons that the
    capability record cannot express.
    """

    op: str
    name: str
    load: Callable[[], Callable[..., Any]]
    capabilities: Capabilities
    missing: Callable[[], str | None] = lambda: None
    limits: Callable[[Spec], list[str]] = lambda spec: []

    def check(self, spec: Spec) -> list[str]:
        """Reasons why this backend cannot serve `spec` here; an empty list means that it can."""
        absent = self.missing()
        return ([absent] if absent else []) + self.capabilities.reasons(spec) + self.limits(spec)


@dataclass(frozen=True)
class Prefer:
    """One row of an op's "auto" table: the order of backends where every stated fact fits."""

    order: tuple[str, ...]
    device: str | None = None
    dtype: torch.dtype | None = None
    compiled: bool | None = None
    min_arch: int = 0
    max_size: int | None = None

    def fits(self, spec: Spec) -> bool:
        """Whether the row speaks about `spec`."""
        return (
            self.device in (None, spec.device)
            and self.dtype in (None, spec.dtype)
            and self.compiled in (None, spec.compiled)
            and self.min_arch <= (spec.arch or 0)
            and (self.max_size is None or spec.size <= self.max_size)
        )


@dataclass(frozen=True)
class Choice:
    """The backend that serves a spec: `call` is its function, `skipped` why others were not."""

    op: str
    backend: str
    call: Callable[..., Any]
    devices: frozenset[str]
    asked: str
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        why = f"asked for {self.asked!r}"
        passed = "; ".join(f"{name}: {', '.join(r)}" for name, r in self.skipped.items())
        return f"{self.op}: {self.backend} ({why}{'; passed over ' + passed if passed else ''})"


_backends: dict[str, dict[str, Backend]] = {}
_tables: dict[str, tuple[Prefer, ...]] = {}
_loaded: dict[tuple[str, str], Callable[..., Any]] = {}
_listeners: list[Callable[[], None]] = []


def on_change(forget: Callable[[], None]) -> None:
    """Call `forget` whenever backends or preferences change: for caches of choices."""
    _listeners.append(forget)


def _changed() -> None:
    for forget in _listeners:
        forget()


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make `backend` selectable by its name; the same call serves ours and third parties'.

    Raises ValueError for a name that is taken (unless `replace=True`) and for "auto", which
    means "choose for me". A third party's backend is used where it is named, never by "auto".
    """
    taken = _backends.setdefault(backend.op, {})
    if backend.name == AUTO:
        raise ValueError("backend name 'auto' is reserved; give the backend a name of its own")
    if backend.name in taken and not replace:
        raise ValueError(
            f"{backend.op}: backend {backend.name!r} is registered already; "
            "choose another name or pass replace=True"
        )
    taken[backend.name] = backend
    _loaded.pop((backend.op, backend.name), None)
    _changed()


def set_preference(op: str, rows: Sequence[Prefer]) -> None:
    """Set the op's "auto" table: the first row that fits a spec gives the order to try."""
    _tables[op] = tuple(rows)
    _changed()


def registered(op: str) -> dict[str, Backend]:
    """The op's backends by name, in order of registration."""
    if op not in _backends:
        raise ValueError(f"no op is called {op!r}; known: {sorted(_backends)}")
    return dict(_backends[op])


def unregister_backend(op: str, name: str) -> None:
    """Take a backend out again; modules that hold its `Choice` keep working."""
    if name not in registered(op):
        raise ValueError(f"{op} has no backend {name!r}; it has {sorted(_backends[op])}")
    del _backends[op][name]
    _loaded.pop((op, name), None)
    _changed()


def resolve(spec: Spec, asked: str = AUTO) -> Choice:
    """The backend that serves `spec`.

    Raises ValueError for an unknown name, BackendUnavailable where the installation lacks the
    backend, UnsupportedFeature where the backend (or, for "auto", every backend) refuses.
    """
    known = registered(spec.op)
    if asked == AUTO:
        return _choose(spec, known)
    if asked not in known:
        raise ValueError(
            f"{spec.op}: unknown backend {asked!r}{did_you_mean(asked, known)}; "
            f"allowed: {sorted([AUTO, *known])}"
        )
    backend = known[asked]
    absent = backend.missing()
    if absent:
        raise BackendUnavailable(
            f"{spec.op}: backend {asked!r} is not available: {absent}. "
            f"What works here: {_serving(spec, known)}"
        )
    reasons = backend.check(spec)
    if reasons:
        raise UnsupportedFeature(
            f"{spec.op}: backend {asked!r} cannot serve {spec}: it {', '.join(reasons)}. "
            f"What works here: {_serving(spec, known)}"
        )
    return _choice(backend, asked, {})


def preference(spec: Spec) -> tuple[str, ...]:
    """The order in which "auto" tries backends for `spec`."""
    for row in _tables.get(spec.op, ()):
        if row.fits(spec):
            return row.order
    return tuple(_backends[spec.op])


def _choose(spec: Spec, known: dict[str, Backend]) -> Choice:
    skipped: dict[str, tuple[str, ...]] = {}
    for name in preference(spec):
        reasons = known[name].check(spec)
        if not reasons:
            return _choice(known[name], AUTO, skipped)
        skipped[name] = tuple(reasons)
    listed = "; ".join(f"{name} {', '.join(reasons)}" for name, reasons in skipped.items())
    raise UnsupportedFeature(f"{spec.op}: no backend serves {spec}: {listed}")


def _choice(backend: Backend, asked: str, skipped: Mapping[str, tuple[str, ...]]) -> Choice:
    key = (backend.op, backend.name)
    if key not in _loaded:
        _loaded[key] = backend.load()
    devices = backend.capabilities.devices
    return Choice(backend.op, backend.name, _loaded[key], devices, asked, skipped)


def _serving(spec: Spec, known: dict[str, Backend]) -> str:
    return ", ".join(repr(n) for n, b in known.items() if not b.check(spec)) or "no backend"
