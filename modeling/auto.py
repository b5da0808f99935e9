"""From model_type to classes: a folder in families/ is named after its model_type.

A family's module is imported when one of its classes is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.config import PreTrainedConfig, read_config
from swathe.modeling.errors import ConfigError
from swathe.modeling.hub import CONFIG_ONLY, hub_options, local_directory
from swathe.modeling.model import PreTrainedModel

FAMILIES = Path(__file__).parent / "families"
HEADS = ("base", "causal_lm")

_registered: dict[str, dict[str, type]] = {}


def register_model(
    model_type: str,
    config_class: type[PreTrainedConfig],
    models: Mapping[str, type[PreTrainedModel]],
) -> None:
    """Make a model of your own known to the Auto classes; `models` maps heads to classes.

    Raises ValueError for a model_type that is taken or differs from the configuration's own, and
    for heads other than "base" and "causal_lm".
    """
    if config_class.model_type != model_type:
        raise ValueError(
            f"register_model: model_type={model_type!r}, but {config_class.__name__}.model_type is "
            f"{config_class.model_type!r}; both must be the same"
        )
    unknown = [head for head in models if head not in HEADS]
    if unknown:
        raise ValueError(
            f"register_model: unknown head {unknown[0]!r}{did_you_mean(unknown[0], HEADS)}; "
            f"allowed: {HEADS}"
        )
    if model_type in model_types():
        raise ValueError(f"register_model: model_type {model_type!r} exists; choose another name")
    _registered[model_type] = {"config": config_class, **models}


def model_types() -> list[str]:
    """Every model_type that the Auto classes know."""
    return sorted({*_folders(), *_registered})


def model_class(model_type: object, head: str) -> Any:
    """The class of a family: head "config", "base" or "causal_lm". Imports that family only."""
    if not isinstance(model_type, str) or model_type not in model_types():
        raise ConfigError(
            f"model_type {model_type!r} is not known{did_you_mean(str(model_type), model_types())};"
            f" known: {model_types()}. Code shipped with a checkpoint is never run; add your own "
            "class with swathe.register_model"
        )
    if model_type in _registered:
        found = _registered[model_type].get(head)
    else:
        name = import_module(f"swathe.modeling.families.{model_type}").CLASSES.get(head)
        room = "configuration" if head == "config" else "modeling"
        home = f"swathe.modeling.families.{model_type}.{room}_{model_type}"
        found = name and getattr(import_module(home), name)
    if found is None:
        raise ConfigError(f"model_type {model_type!r} has no class for {head!r}")
    return found


@lru_cache(maxsize=1)
def _folders() -> tuple[str, ...]:
    return tuple(p.name for p in FAMILIES.iterdir() if (p / f"configuration_{p.name}.py").exists())


class AutoConfig:
    """Chooses the configuration class by model_type."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *, subfolder: str = "", **overrides: Any) -> Any:
        """The configuration in `path`; see PreTrainedConfig.from_pretrained."""
        path = local_directory(path, subfolder, CONFIG_ONLY, **hub_options(overrides))
        file, values = read_config(path, subfolder)
        try:
            chosen = model_class(values.get("model_type"), "config")
        except ConfigError as problem:
            raise ConfigError(f"{file}: {problem}") from None
        return chosen.from_pretrained(path, subfolder=subfolder, **overrides)

    @classmethod
    def for_model(cls, model_type: str, **values: Any) -> Any:
        """A new configuration of the given type."""
        return model_class(model_type, "config")(**values)


class _AutoModel:
    head = ""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"use {name}.from_pretrained(directory) or {name}.from_config(config)")

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """The model in `path`, with the class its config.json asks for.

        Options as for PreTrainedModel.from_pretrained.
        """
        path = local_directory(path, options.get("subfolder", ""), **hub_options(options))
        config = options.get("config")
        if config is None:
            config = AutoConfig.from_pretrained(path, subfolder=options.get("subfolder", ""))
        return model_class(config.model_type, cls.head).from_pretrained(path, **options)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Any:
        """A freshly initialised model; options as for PreTrainedModel.from_config."""
        return model_class(config.model_type, cls.head).from_config(config, **options)


class AutoModel(_AutoModel):
    """Chooses a body without a head."""

    head = "base"


class AutoModelForCausalLM(_AutoModel):
    """Chooses a language model."""

    head = "causal_lm"
