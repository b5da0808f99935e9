"""One set of weights, two models: ours of transformers' (from_hf), transformers' of ours (to_hf).

Both models hold the same Parameter objects: no memory is copied, an optimizer over one trains the
other, and what is loaded into one is loaded into both. All else is each model's own: configuration,
buffers that files do not hold, hooks, the training flag (which starts as the other's).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from swathe.modeling.auto import HEADS, model_class, model_types
from swathe.modeling.errors import ConfigError
from swathe.modeling.generation.config import GenerationConfig
from swathe.modeling.model import PreTrainedModel


def from_hf(
    model: transformers.PreTrainedModel,
    *,
    attn_implementation: str | None = None,
    loss_implementation: str | None = None,
    kernels: Any = None,
) -> PreTrainedModel:
    """Our model over the parameters of a transformers model; options as for `from_config`.

    The class is ours of the same name. Parameters that one of the models alone would have, such as
    an adapter's or a quantised weight's, are an error, and so are hooks: ours would not run them.
    Weights that are tied stay tied, those that are not stay apart, whatever the configuration says.
    Raises TypeError for another kind of model, ValueError for one with hooks, ConfigError for a
    class or a configuration that we do not have.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"from_hf: got a {type(model).__name__}; it takes a transformers.PreTrainedModel. "
            "Unwrap it first (a PEFT model: merge_and_unload(); a DDP model: .module)"
        )
    refuse_hooks(model)
    chosen = _ours(type(model).__name__, model.config.model_type)
    values = model.config.to_dict()
    values["tie_word_embeddings"] = _is_tied(model)
    config = chosen.config_class.from_dict(values)
    with torch.device("meta"):
        ours = chosen.from_config(
            config,
            attn_implementation=attn_implementation,
            loss_implementation=loss_implementation,
            kernels=kernels,
        )
    _share(model, ours)
    for module in ours.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.reset_buffers(model.device)  # type: ignore[operator]
    ours._adopt(ours._kernel_policy)
    if ours.can_generate() and model.generation_config is not None:
        ours.generation_config = generation_config_of(model.generation_config)
    return ours.train(model.training)


def to_hf(
    model: PreTrainedModel, *, attn_implementation: str = "sdpa", **options: Any
) -> transformers.PreTrainedModel:
    """A transformers model over the parameters of ours, of the class with the same name.

    `options` are its from_pretrained's, such as `experts_implementation`.
    Raises TypeError for another kind of model, ValueError for one with hooks, ConfigError for a
    class that transformers lacks.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"to_hf: got a {type(model).__name__}; it takes a swathe.PreTrainedModel")
    refuse_hooks(model)
    name, kind = type(model).__name__, model.config.model_type
    chosen = getattr(transformers, name, None)
    if chosen is None or kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"to_hf: transformers {transformers.__version__} has no {name} of model_type {kind!r}; "
            "models of your own exist here alone"
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(
        {**model.config.to_dict(), "tie_word_embeddings": _is_tied(model)}
    )
    theirs = chosen.from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        attn_implementation=attn_implementation,
        **options,
    )
    _share(model, theirs)
    return theirs.train(model.training)


def _ours(name: str, model_type: str) -> type[PreTrainedModel]:
    if model_type in model_types():
        for head in HEADS:
            try:
                found = model_class(model_type, head, [name])
            except ConfigError:
                continue
            if found.__name__ == name:
                return found
    raise ConfigError(
        f"from_hf: there is no {name} of model_type {model_type!r} here; the families are "
        f"{model_types()}. swathe.patch makes transformers' own model fast as it is"
    )


def generation_config_of(theirs: transformers.GenerationConfig) -> GenerationConfig:
    """Ours with the special tokens of one of transformers', all else in `extra`."""
    values = theirs.to_diff_dict()
    tokens = {name: values.pop(f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return GenerationConfig(**{f"{name}_token_id": t for name, t in tokens.items()}, extra=values)


def _is_tied(model: Any) -> bool:
    """Whether the head really is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def refuse_hooks(model: nn.Module) -> None:
    """Raise ValueError for a model with hooks, which another one would not run."""
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(hooks) or "_hf_hook" in vars(module):
            raise ValueError(
                f"{name or type(model).__name__} has hooks, which the other model would not run; "
                "remove them first (accelerate's: accelerate.hooks.remove_hook_from_module)"
            )


def _share(source: nn.Module, target: nn.Module) -> None:
    """Put source's Parameters and stored buffers in the places of target's."""
    stored = source.state_dict(keep_vars=True)
    wanted = target.state_dict(keep_vars=True)
    shapes = {name: t.shape for name, t in wanted.items()}
    wrong = sorted(
        name
        for name in stored.keys() | wanted.keys()
        if name not in stored or shapes.get(name) != stored[name].shape
    )
    if wrong:
        raise ConfigError(
            f"{type(source).__name__} and {type(target).__name__} differ in {len(wrong)} tensors, "
            f"the first of them {wrong[:3]}: adapters must be merged, quantised weights "
            "dequantised, and modules as the class makes them"
        )
    for name, tensor in stored.items():
        path, _, own = name.rpartition(".")
        module = target.get_submodule(path)
        (module._parameters if own in module._parameters else module._buffers)[own] = tensor  # type: ignore[assignment]
