"""HF-compatible models that choose their kernels from configuration.

Public names are imported when they are first asked for; a family comes with its own names only.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AutoConfig": "auto",
    "AutoModel": "auto",
    "AutoModelForCausalLM": "auto",
    "AutoModelForMaskedLM": "auto",
    "AutoModelForQuestionAnswering": "auto",
    "AutoModelForSequenceClassification": "auto",
    "AutoModelForTokenClassification": "auto",
    "CheckpointError": "checkpoint.errors",
    "ConfigError": "errors",
    "DynamicCache": "cache",
    "EncoderDecoderCache": "cross_cache",
    "KernelPolicy": "policy",
    "KernelReport": "policy",
    "Mask": "masks",
    "PreTrainedConfig": "config",
    "PreTrainedModel": "model",
    "PretrainedConfig": "config",
    "StaticCache": "cache",
    "UninitializedParameter": "errors",
    "register_model": "auto",
    "register_rope": "rope",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and name not in _HOME:
        families = import_module("swathe.modeling.families")
        if name in families.__all__:
            return getattr(families, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"swathe.modeling.{_HOME[name]}"), name)
