"""Makes attn_implementation="swathe" and "triton" known to transformers, without importing models.

transformers keeps both interfaces in modules that take seconds to import, which `import
transformers` puts off. So does this: the names are registered when transformers.modeling_utils,
where every model's code begins, has run; at once where it has already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOME = "transformers.modeling_utils"
_MASKS = "transformers.masking_utils"


def register() -> None:
    """Register both names with both interfaces, now or as soon as the interfaces are there."""
    if _HOME in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    attention = import_module("swathe.modeling.hf.attention")
    masks = import_module("swathe.modeling.hf.masks")
    for name, forward in attention.FORWARDS.items():
        import_module(_HOME).AttentionInterface.register(name, forward)
        import_module(_MASKS).AttentionMaskInterface.register(name, masks.interval_mask)


class _Waiting(MetaPathFinder):
    """Finds nothing but _HOME, once, and then as any other finder would."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Another loader, and `register` after it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module shall look as if it had been loaded without us
        made: Any = module
        made.__loader__ = made.__spec__.loader = self._own
        self._own.exec_module(module)
        _register()
