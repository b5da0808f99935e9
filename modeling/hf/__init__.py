"""Where swathe meets transformers: the only code that imports it.

    with_generate(model)      gives one of our models transformers' `generate`
    without_generate(model)   takes it away again
    generate(model, ids)      our decoding loop for models of either kind
    forget_graphs(model)      free the decode steps that it has captured
    from_hf(model)            our model over the weights of one of transformers'
    to_hf(model)              transformers' model over the weights of one of ours
    attention_options(...)    what attn_implementation="swathe" and "triton" do where they cannot
                              serve; importing this package makes both names known to transformers
    patch(model)              one of transformers' models on our kernels, in place; unpatch, patched
    verify(model, batch)      whether a patched model still is the model that it was

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
    from swathe.modeling.hf.decode import forget_graphs, generate
    from swathe.modeling.hf.equivalence import verify
    from swathe.modeling.hf.generation import with_generate, without_generate
    from swathe.modeling.hf.patching.api import patch, unpatch
    from swathe.modeling.hf.patching.patch import patched
    from swathe.modeling.hf.share import from_hf, to_hf

_HOME = {
    "attention_options": "attention",
    "forget_graphs": "decode",
    "from_hf": "share",
    "generate": "decode",
    "patch": "patching.api",
    "patched": "patching.patch",
    "to_hf": "share",
    "unpatch": "patching.api",
    "verify": "equivalence",
    "with_generate": "generation",
    "without_generate": "generation",
}

__all__ = [
    "attention_options",
    "forget_graphs",
    "from_hf",
    "generate",
    "patch",
    "patched",
    "to_hf",
    "unpatch",
    "verify",
    "with_generate",
    "without_generate",
]

require()
register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
