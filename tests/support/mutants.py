"""Planted bugs: a kernel file with one line made wrong, to see whether the tests notice.

A mutant is a copy of the file in which one text is replaced by another, imported under a name of
its own. The text must occur in the file: a table that no longer fits is an error, not a pass.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from support.interpreter import SanitizerError, sanitized
from swathe.kernels.core.contract import Case, Contract, Problem, measure
from swathe.kernels.core.registry import (
    Backend,
    register_backend,
    registered,
    unregister_backend,
)
from swathe.kernels.core.testing import Report
from swathe.kernels.core.tune import tunables

Fused = Callable[[str, str], Callable[..., Any]]


class Mutant(NamedTuple):
    """Old text, new text, and which of the old text's occurrences is replaced."""

    old: str
    new: str
    which: int = 0


@contextmanager
def planted(
    source: ModuleType, mutant: Mutant, folder: Path, users: Sequence[ModuleType] = ()
) -> Iterator[str]:
    """A copy of the module `source` with the bug in it; gives the name it is imported under.

    `users` import from the source and, later ones, from each other: they are imported anew, with
    the bug in place, and the name is that of the last one.
    """
    assert source.__file__ is not None
    path = Path(source.__file__)
    text, at = path.read_text(), -1
    for _ in range(mutant.which + 1):
        at = text.find(mutant.old, at + 1)
        if at < 0:
            raise ValueError(f"{path.name} has no occurrence {mutant.which} of {mutant.old!r}")
    copy = folder / f"mutant_{folder.name}.py"
    copy.write_text(text[:at] + mutant.new + text[at + len(mutant.old) :])
    # the copy's Tunables would take the place of the source's
    registered = {op: dict(kernels) for op, kernels in tunables.items()}
    names: list[str] = []
    try:
        for module, file in ((source, copy), *((user, user.__file__) for user in users)):
            names.append(f"mutant_{folder.name}_{len(names)}" if names else copy.stem)
            _place(module, _load(names[-1], str(file)))
        yield names[-1]
    finally:
        for module in (source, *users):
            _place(module, module)
        for name in names:
            sys.modules.pop(name, None)
        tunables.clear()
        tunables.update(registered)


def _load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _place(module: ModuleType, other: ModuleType) -> None:
    """Give `other` to whoever imports `module` from now on."""
    package, _, leaf = module.__name__.rpartition(".")
    sys.modules[module.__name__] = other
    if package in sys.modules:
        setattr(sys.modules[package], leaf, other)


def caught(
    contract: Contract, fused: Fused, module: str, problems: Iterable[Problem]
) -> str | None:
    """What the contract or the sanitizer says of the launchers in `module`; None if nothing.

    Single elements are bounded, families' rounding points compared, gradients included; the pooled
    ratios are not, since a mutant is tried on few elements.
    """
    record = registered(contract.op)["triton"].capabilities
    name = module.replace(".", "_")
    register_backend(Backend(contract.op, name, lambda: fused(name, module), record))
    try:
        with sanitized(order="random", seed=3):
            for problem in problems:
                report = Report(name)
                measure(contract, report, Case("", problem), name)
                if report.misses:
                    return report.misses[0]
    except (SanitizerError, AssertionError) as error:
        return str(error)
    finally:
        unregister_backend(contract.op, name)
    return None


def apart(t: torch.Tensor) -> torch.Tensor:
    """The same values with NaN between the rows: a kernel that ignores the stride meets them."""
    padded = t.new_full((*t.shape[:-1], t.shape[-1] + 7), float("nan"))
    padded[..., : t.shape[-1]] = t
    return padded[..., : t.shape[-1]]
