"""swathe: fast kernels for Hugging Face-style models, and proof that the fast model is the same.

Every public name below is imported when it is first asked for, so that `import swathe` costs
little more than `import torch` and pulls in neither Triton nor any model family.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# a checkout made without symbolic links has text files where the two links belong
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from swathe.kernels.catalog import backends, explain
    from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
    from swathe.kernels.core.registry import Backend, Capabilities, register_backend
    from swathe.kernels.norm.api import rms_norm

_HOME = {
    "Backend": "swathe.kernels.core.registry",
    "BackendUnavailable": "swathe.kernels.core.errors",
    "Capabilities": "swathe.kernels.core.registry",
    "UnsupportedFeature": "swathe.kernels.core.errors",
    "backends": "swathe.kernels.catalog",
    "explain": "swathe.kernels.catalog",
    "register_backend": "swathe.kernels.core.registry",
    "rms_norm": "swathe.kernels.norm.api",
}

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Capabilities",
    "UnsupportedFeature",
    "__version__",
    "backends",
    "explain",
    "register_backend",
    "rms_norm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'swathe' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
