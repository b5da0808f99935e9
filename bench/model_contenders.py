"""Who trains and decodes whole models: transformers in several ways, Liger, our patch, our models.

Every contender starts from transformers' model of the same random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from bench.contenders import peer

Model = Any


@dataclass(frozen=True)
class ModelContender:
    """transformers' model with an attention, and what is done to it.

    options   what its `generate` gets besides
    absent    why it is not here; it is asked when the contender's turn comes
    logits    whether its loss forms all of them
    compiles  whether it takes torch.compile, which a dry run leaves out
    ours      whether the comparison is about it
    """

    attention: str
    prepare: Callable[[Model], Model] = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)
    absent: Callable[[], str | None] = lambda: None
    logits: bool = True
    compiles: bool = False
    ours: bool = False


def _compiled(model: Model) -> Model:
    return torch.compile(model)


def _liger(model: Model) -> Model:
    patching = import_module("liger_kernel.transformers.monkey_patch")
    patching._apply_liger_kernel_to_instance(model=model)
    return model


def _no_liger() -> str | None:
    return peer("liger_kernel.transformers.monkey_patch")[1]


def _patched(model: Model) -> Model:
    import swathe

    print(swathe.patch(model), file=sys.stderr)
    return model


def _own(model: Model) -> Model:
    import swathe.hf

    return swathe.hf.from_hf(model, loss_implementation="auto")


_STATIC = {"cache_implementation": "static"}
_LIGER = ModelContender("sdpa", _liger, absent=_no_liger, logits=False)
TRAINING = {
    "eager": ModelContender("eager"),
    "sdpa": ModelContender("sdpa"),
    "compile": ModelContender("sdpa", _compiled, compiles=True),
    "liger": _LIGER,
    "patch": ModelContender("swathe", _patched, logits=False, ours=True),
    "own": ModelContender("sdpa", _own, logits=False, ours=True),
}
# with a static cache transformers' generate compiles the decode step, its own way to go fast; "own"
# has one where a step can be captured in a graph
DECODING = {
    "eager": ModelContender("eager"),
    "sdpa": ModelContender("sdpa"),
    "compile": ModelContender("sdpa", options=_STATIC, compiles=True),
    "liger": _LIGER,
    "patch": ModelContender("swathe", _patched, logits=False, ours=True),
    "patch_compile": ModelContender("swathe", _patched, _STATIC, compiles=True, ours=True),
    "own": ModelContender("sdpa", _own, logits=False, ours=True),
}


def import_libraries() -> None:
    """Import what building a model takes, while other contenders are still at it."""
    import_module("transformers").AutoModelForCausalLM  # noqa: B018  it is imported when looked up
    import_module("swathe.hf").patch  # noqa: B018


def built(contender: ModelContender, shape: dict[str, Any], dtype: str, device: str) -> Model:
    """The contender's model with random weights, which are the same for every contender."""
    import transformers

    import swathe.hf  # noqa: F401  attn_implementation="swathe"
    from bench.models import transformers_config

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers_config(shape),
            dtype=getattr(torch, dtype),
            attn_implementation=contender.attention,
        )
    # nothing ends a text: every contender makes as many tokens
    model.generation_config.eos_token_id = None
    return contender.prepare(model)
