"""From model_type to classes: a folder in families/ is named after its model_type.

A family's module is imported when one of its classes is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_file import read_config
from swathe.modeling.errors import ConfigError
from swathe.modeling.hub import CONFIG_ONLY, hub_options, local_directory, needed
from swathe.modeling.model import PreTrainedModel

FAMILIES = Path(__file__).parent / "families"
HEADS = (
    "base",
    "causal_lm",
    "masked_lm",
    "seq_cls",
    "token_cls",
    "question_answering",
)

_registered: dict[str, dict[str, Any]] = {}


def register_model(
    model_type: str,
    config_class: type[PreTrainedConfig],
    models: Mapping[str, type[PreTrainedModel] | Sequence[type[PreTrainedModel]]],
) -> None:
    """Make a model of your own known to the Auto classes; `models` maps heads to classes.

    A head may have several classes, the default first; config.json's `architectures` chooses.
    Raises ValueError for a model_type that is taken or differs from the configuration's own, and
    for heads that are not in HEADS.
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


def model_class(model_type: object, head: str, architectures: Sequence[str] | None = None) -> Any:
    """The class of a family: head "config" or one of HEADS. Imports that family only.

    Of several classes with that head it is the one that `architectures` names, else the first.
    """
    if not isinstance(model_type, str) or model_type not in model_types():
        raise ConfigError(
            f"model_type {model_type!r} is not known{did_you_mean(str(model_type), model_types())};"
            f" known: {model_types()}. Code shipped with a checkpoint is never run; add your own "
            "class with swathe.register_model"
        )
    if model_type in _registered:
        table = _registered[model_type]
        found = _one_of(table.get(head, ()), lambda c: c.__name__, architectures)
    else:
        table = import_module(f"swathe.modeling.families.{model_type}").CLASSES
        name = _one_of(table.get(head, ()), str, architectures)
        room = "configuration" if head == "config" else "modeling"
        home = f"swathe.modeling.families.{model_type}.{room}_{model_type}"
        found = name and getattr(import_module(home), name)
    if found is None:
        raise ConfigError(
            f"model_type {model_type!r} has no class for {head!r}; it has "
            f"{[h for h in HEADS if table.get(h)]}"
            + (f", and config.json asks for {list(architectures)}" if architectures else "")
        )
    return found


def _one_of(
    choices: Any, name_of: Callable[[Any], str], architectures: Sequence[str] | None
) -> Any:
    several = list(choices) if isinstance(choices, list | tuple) else [choices]
    asked = [choice for choice in several if name_of(choice) in (architectures or ())]
    return next(iter((*asked, *several)), None)


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
    def from_pretrained(cls, path: str | Path | None, **options: Any) -> Any:
        """The model in `path`, with the class that its config.json, or a given `config`, asks for.

        Options as for PreTrainedModel.from_pretrained.
        """
        config, subfolder = options.get("config"), options.get("subfolder", "")
        if path is not None:
            files = needed(options.get("variant"))
            path = local_directory(path, subfolder, files, **hub_options(options))
        if config is None and path is not None:
            config = AutoConfig.from_pretrained(path, subfolder=subfolder)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"{cls.__name__}.from_pretrained: path={path!r} and config={config!r} leave open "
                "which class to load; give a path that has config.json, or a configuration"
            )
        chosen = model_class(config.model_type, cls.head, config.architectures)
        return chosen.from_pretrained(path, **options)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Any:
        """A freshly initialised model; options as for PreTrainedModel.from_config."""
        chosen = model_class(config.model_type, cls.head, config.architectures)
        return chosen.from_config(config, **options)


class AutoModel(_AutoModel):
    """Chooses a body without a head."""

    head = "base"


class AutoModelForCausalLM(_AutoModel):
    """Chooses a language model."""

    head = "causal_lm"


class AutoModelForMaskedLM(_AutoModel):
    """Chooses a masked language model."""

    head = "masked_lm"


class AutoModelForSequenceClassification(_AutoModel):
    """Chooses a classifier of sequences."""

    head = "seq_cls"


class AutoModelForTokenClassification(_AutoModel):
    """Chooses a classifier of tokens."""

    head = "token_cls"


class AutoModelForQuestionAnswering(_AutoModel):
    """Chooses a model that finds answers in a text."""

    head = "question_answering"
