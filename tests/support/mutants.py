"""Planted bugs: a kernel file with one line made wrong, to see whether the tests notice.

A mutant is a copy of the file in which one text is replaced by another, imported under a name of
its own. The text must occur in the file: a table that no longer fits is an error, not a pass.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def plant(source: Path, old: str, new: str, name: str, folder: Path, which: int = 0) -> ModuleType:
    """Import `source` with the `which`-th occurrence of `old` replaced, as module `name`."""
    text = source.read_text()
    at = -1
    for _ in range(which + 1):
        at = text.find(old, at + 1)
        if at < 0:
            raise ValueError(f"{source.name} has no occurrence {which} of {old!r}")
    path = folder / f"{name}.py"
    path.write_text(text[:at] + new + text[at + len(old) :])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
