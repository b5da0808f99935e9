"""swathe together with transformers; needs transformers 5.10 or newer (modeling/hf).

Importing it makes attn_implementation="swathe" and "triton" known to transformers; the names below
are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swathe.modeling import hf

if TYPE_CHECKING:
    from swathe.modeling.hf import (
        attention_options,
        forget_graphs,
        from_hf,
        generate,
        patch,
        patched,
        to_hf,
        unpatch,
        verify,
        with_generate,
        without_generate,
    )

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


def __getattr__(name: str) -> Any:
    return getattr(hf, name)  # imported when it is asked for
