"""swathe together with transformers; needs transformers 5.10 or newer (modeling/hf)."""

from swathe.modeling.hf import with_generate, without_generate

__all__ = ["with_generate", "without_generate"]
