"""swathe together with transformers; needs transformers 5.10 or newer (modeling/hf)."""

from swathe.modeling.hf import (
    from_hf,
    patch,
    patched,
    to_hf,
    unpatch,
    verify,
    with_generate,
    without_generate,
)

__all__ = [
    "from_hf",
    "patch",
    "patched",
    "to_hf",
    "unpatch",
    "verify",
    "with_generate",
    "without_generate",
]
