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
    from swathe.kernels.attention.api import attention, register_attention
    from swathe.kernels.attention.mask import Mask
    from swathe.kernels.catalog import backends, explain
    from swathe.kernels.core.debug import debug
    from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
    from swathe.kernels.core.registry import Backend, register_backend
    from swathe.kernels.core.spec import Capabilities
    from swathe.kernels.cross_entropy.api import cross_entropy
    from swathe.kernels.gated_mlp_act.api import gated_mlp_act, geglu, reglu, swiglu
    from swathe.kernels.layer_norm.api import layer_norm
    from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy
    from swathe.kernels.norm.api import rms_norm
    from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary
    from swathe.kernels.rotary.api import rotary
    from swathe.kernels.tuner import use_tuned
    from swathe.modeling.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        register_model,
    )
    from swathe.modeling.cache import DynamicCache, StaticCache
    from swathe.modeling.checkpoint.errors import CheckpointError
    from swathe.modeling.config import PreTrainedConfig, PretrainedConfig
    from swathe.modeling.cross_cache import EncoderDecoderCache
    from swathe.modeling.dispatch import dispatch_model
    from swathe.modeling.errors import ConfigError, UninitializedParameter
    from swathe.modeling.families import *  # noqa: F403
    from swathe.modeling.generation.config import GenerationConfig
    from swathe.modeling.generation.streamer import TextStreamer
    from swathe.modeling.hf.decode import generate as generate
    from swathe.modeling.hf.equivalence import verify as verify
    from swathe.modeling.hf.patching.api import patch as patch
    from swathe.modeling.hf.patching.api import unpatch as unpatch
    from swathe.modeling.hf.patching.patch import patched as patched
    from swathe.modeling.memory import memory_estimate
    from swathe.modeling.model import PreTrainedModel
    from swathe.modeling.policy import KernelPolicy, KernelReport
    from swathe.modeling.rope import register_rope
    from swathe.modeling.warmup import warmup

_HOME = {
    "AutoConfig": "swathe.modeling.auto",
    "AutoModel": "swathe.modeling.auto",
    "AutoModelForCausalLM": "swathe.modeling.auto",
    "AutoModelForMaskedLM": "swathe.modeling.auto",
    "AutoModelForQuestionAnswering": "swathe.modeling.auto",
    "AutoModelForSequenceClassification": "swathe.modeling.auto",
    "AutoModelForTokenClassification": "swathe.modeling.auto",
    "Backend": "swathe.kernels.core.registry",
    "BackendUnavailable": "swathe.kernels.core.errors",
    "Capabilities": "swathe.kernels.core.spec",
    "CheckpointError": "swathe.modeling.checkpoint.errors",
    "ConfigError": "swathe.modeling.errors",
    "DynamicCache": "swathe.modeling.cache",
    "EncoderDecoderCache": "swathe.modeling.cross_cache",
    "GenerationConfig": "swathe.modeling.generation.config",
    "KernelPolicy": "swathe.modeling.policy",
    "KernelReport": "swathe.modeling.policy",
    "Mask": "swathe.kernels.attention.mask",
    "PreTrainedConfig": "swathe.modeling.config",
    "PreTrainedModel": "swathe.modeling.model",
    "PretrainedConfig": "swathe.modeling.config",
    "StaticCache": "swathe.modeling.cache",
    "TextStreamer": "swathe.modeling.generation.streamer",
    "UninitializedParameter": "swathe.modeling.errors",
    "UnsupportedFeature": "swathe.kernels.core.errors",
    "attention": "swathe.kernels.attention.api",
    "backends": "swathe.kernels.catalog",
    "cross_entropy": "swathe.kernels.cross_entropy.api",
    "debug": "swathe.kernels.core.debug",
    "dispatch_model": "swathe.modeling.dispatch",
    "explain": "swathe.kernels.catalog",
    "gated_mlp_act": "swathe.kernels.gated_mlp_act.api",
    "geglu": "swathe.kernels.gated_mlp_act.api",
    "layer_norm": "swathe.kernels.layer_norm.api",
    "linear_cross_entropy": "swathe.kernels.linear_cross_entropy.api",
    "memory_estimate": "swathe.modeling.memory",
    "qk_norm_rotary": "swathe.kernels.qk_norm_rotary.api",
    "register_attention": "swathe.kernels.attention.api",
    "register_backend": "swathe.kernels.core.registry",
    "register_model": "swathe.modeling.auto",
    "register_rope": "swathe.modeling.rope",
    "reglu": "swathe.kernels.gated_mlp_act.api",
    "rms_norm": "swathe.kernels.norm.api",
    "rotary": "swathe.kernels.rotary.api",
    "swiglu": "swathe.kernels.gated_mlp_act.api",
    "use_tuned": "swathe.kernels.tuner",
    "warmup": "swathe.modeling.warmup",
}

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "Backend",
    "BackendUnavailable",
    "Capabilities",
    "CheckpointError",
    "ConfigError",
    "DynamicCache",
    "EncoderDecoderCache",
    "GenerationConfig",
    "KernelPolicy",
    "KernelReport",
    "Mask",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PretrainedConfig",
    "StaticCache",
    "TextStreamer",
    "UninitializedParameter",
    "UnsupportedFeature",
    "__version__",
    "attention",
    "backends",
    "cross_entropy",
    "debug",
    "dispatch_model",
    "explain",
    "gated_mlp_act",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "memory_estimate",
    "qk_norm_rotary",
    "register_attention",
    "register_backend",
    "register_model",
    "register_rope",
    "reglu",
    "rms_norm",
    "rotary",
    "swiglu",
    "use_tuned",
    "warmup",
]

# not in __all__: a star import shall not need transformers
_NEED_TRANSFORMERS = ("generate", "patch", "patched", "unpatch", "verify")


def __getattr__(name: str) -> Any:
    if name == "hf":
        return import_module("swathe.hf")
    if name in _NEED_TRANSFORMERS:
        return getattr(import_module("swathe.hf"), name)
    home = _HOME.get(name)
    if home is None and name[:1].isupper():
        families = import_module("swathe.modeling.families")
        home = families.__name__ if name in families.__all__ else None
    if home is None:
        raise AttributeError(
            f"module 'swathe' has no attribute {name!r}; it has {__all__} and the classes of "
            "model families, which swathe.modeling.families lists"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NEED_TRANSFORMERS})
