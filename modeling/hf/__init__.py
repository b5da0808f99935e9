"""Where swathe meets transformers: the only code that imports it.

    with_generate(model)      gives one of our models transformers' `generate`
    without_generate(model)   takes it away again
    from_hf(model)            our model over the weights of one of transformers'
    to_hf(model)              transformers' model over the weights of one of ours
    patch(model)              puts a model of transformers on our kernels, in place
    unpatch(model)            undoes that; `with patched(model)` does both
    attention_options(...)    what attn_implementation="swathe" and "triton" do where they cannot
                              serve; importing this package makes both names known to transformers

Importing this package needs transformers 5.10 or newer, and says so where that is missing; it does
not wait for the import of transformers' model code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swathe.modeling.hf.installed import require
from swathe.modeling.hf.registration import register

if TYPE_CHECKING:
    from swathe.modeling.hf.attention import attention_options
    from swathe.modeling.hf.generate import with_generate, without_generate
    from swathe.modeling.hf.patching.patch import patch, patched, unpatch
    from swathe.modeling.hf.share import from_hf, to_hf

_HOME = {
    "attention_options": "attention",
    "from_hf": "share",
    "patch": "patching.patch",
    "patched": "patching.patch",
    "to_hf": "share",
    "unpatch": "patching.patch",
    "with_generate": "generate",
    "without_generate": "generate",
}

__all__ = [
    "attention_options",
    "from_hf",
    "patch",
    "patched",
    "to_hf",
    "unpatch",
    "with_generate",
    "without_generate",
]

require()
register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
