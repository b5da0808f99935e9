"""What from_pretrained's arguments mean before anything is read: sources, names, patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swathe.modeling.checkpoint.given import GivenTensors
from swathe.modeling.checkpoint.reader import Checkpoint
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.hub import hub_options, local_directory, needed

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel


def source_directory(
    cls: type[PreTrainedModel],
    path: str | Path | None,
    subfolder: str,
    config: PreTrainedConfig | None,
    state_dict: Mapping[str, Tensor] | None,
    variant: str | None,
    options: dict[str, Any],
) -> Path | None:
    """Where the files are; None for a state_dict, which needs a configuration and no path.

    Takes those of HUB_OPTIONS out of `options`.
    """
    hub = hub_options(options)
    if path is not None and state_dict is None:
        return local_directory(path, subfolder, needed(variant), **hub) / subfolder
    if path is not None or state_dict is None or config is None:
        given = {"path": path, "state_dict": state_dict, "config": config}
        raise ValueError(
            f"{cls.__name__}.from_pretrained got {[k for k, v in given.items() if v is not None]} "
            "of path, state_dict and config. `state_dict` cannot be passed together with a model "
            "name: give a path, or path=None with a state_dict and a config"
        )
    return None


def config_of(
    cls: type[PreTrainedModel], config: PreTrainedConfig | None, directory: Path | None
) -> PreTrainedConfig:
    """The configuration that was given, or that of the files."""
    if config is None:
        assert directory is not None
        return _unquantised(cls.config_class.from_pretrained(directory))
    if not isinstance(config, PreTrainedConfig):
        name = cls.config_class.__name__
        raise TypeError(
            f"{cls.__name__}.from_pretrained: config is a {type(config).__name__}; it must be a "
            f"{name}, such as {name}.from_pretrained(path)"
        )
    return _unquantised(config)


def source_tensors(
    directory: Path | None, variant: str | None, state_dict: Mapping[str, Tensor] | None
) -> Checkpoint:
    """The tensors to load, by their stored names."""
    if directory is None:
        return GivenTensors.of(state_dict)
    return Checkpoint.open(directory, variant)


def ignored_names(holders: Sequence[object], **given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What load_into is to ignore: the caller's patterns of `missing` and `unexpected` names.

    `holders` have more: the model's class, and a configuration that the caller set them on.
    """
    found = {}
    for what, patterns in given.items():
        if isinstance(patterns, str):
            raise TypeError(
                f"ignore_{what}={patterns!r} is one str; pass a list of patterns: [{patterns!r}]"
            )
        name = f"_keys_to_ignore_on_load_{what}"
        held = (pattern for holder in holders for pattern in getattr(holder, name, ()))
        found[f"ignore_{what}"] = (*patterns, *held)
    return found


def _unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    if config.extra.get("quantization_config"):
        raise NotImplementedError(
            f"config.json has a quantization_config ({config.extra['quantization_config']}); "
            "quantised weights are not read here: load the model with transformers, or use a "
            "checkpoint in bfloat16"
        )
    return config
