"""PreTrainedConfig: what a model is, as a strict keyword-only dataclass, and HF's config.json.

Three rules. A wrong name, type or range raises when the configuration is made. config.json comes
in and goes out as HF writes it; keys of a file that no field knows are kept in `extra`. How a model
runs (`attn_implementation` and its like, `kernels`, `rope_length`, `attn_capture`) is never read
from or written to a file.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self, dataclass_transform

import torch

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.config_fields import (
    Range,
    check_range,
    check_type,
    dtype_named,
    labels_by_number,
    named_labels,
)
from swathe.modeling.config_file import CONFIG_FILE, read_config
from swathe.modeling.errors import ConfigError
from swathe.modeling.hub import CONFIG_ONLY, hub_options, local_directory
from swathe.modeling.strict_json import dumps, write_text

logger = logging.getLogger(__name__)

RUNTIME = (
    "attn_implementation",
    "norm_implementation",
    "rope_implementation",
    "mlp_implementation",
    "linear_implementation",
    "loss_implementation",
    "kernels",
)
NOT_IN_FILES = (*RUNTIME, "rope_length", "attn_capture")
ALIASES = {"torch_dtype": "dtype", "rope_scaling": "rope_parameters"}
_DERIVED: Any = type("derived", (), {"__repr__": lambda self: "derived"})()


def derived(compute: Callable[[Any], Any]) -> Any:
    """A field that, left at None, is computed from the others each time it is read."""
    return field(default_factory=lambda: _DERIVED, metadata={"compute": compute})


class _ConfigType(type):
    """Looks at the arguments before the dataclass does, to name the nearest field in errors."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if args:
            raise TypeError(
                f"{cls.__name__} takes keyword arguments only; got {args!r}. Name them, or use "
                f"{cls.__name__}.from_dict(values) for a dict"
            )
        config: Any = super().__call__(**cls._prepared(values))  # type: ignore[attr-defined]
        return config


@dataclass_transform(kw_only_default=True, eq_default=False)
@dataclass(kw_only=True, eq=False, repr=False)
class PreTrainedConfig(metaclass=_ConfigType):
    """Base of all configurations; a subclass lists its fields with annotations and defaults."""

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = []
    base_model_tp_plan: ClassVar[dict[str, str] | None] = None
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]] | None] = None
    ranges: ClassVar[dict[str, Range]] = {"chunk_size_feed_forward": (0, 2**20)}

    architectures: list[str] | None = None
    dtype: torch.dtype | None = None
    return_dict: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    is_encoder_decoder: bool = False
    chunk_size_feed_forward: int = 0
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = derived(  # noqa: RUF009  it returns a field
        lambda c: {v: k for k, v in c.id2label.items()}
    )
    problem_type: (
        typing.Literal["regression", "single_label_classification", "multi_label_classification"]
        | None
    ) = None
    transformers_version: str | None = None
    attn_implementation: str | None = None
    norm_implementation: str | None = None
    rope_implementation: str | None = None
    mlp_implementation: str | None = None
    linear_implementation: str | None = None
    loss_implementation: str | None = None
    attn_capture: typing.Literal["recompute"] | None = None
    kernels: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        dataclass(kw_only=True, eq=False, repr=False)(cls)
        cls.ranges = {
            k: v for c in reversed(cls.__mro__) for k, v in vars(c).get("ranges", {}).items()
        }

    @classmethod
    def _prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = _names(cls)
        for old, new in {**ALIASES, **cls.attribute_map}.items():
            if old in values and new in known:
                value = values.pop(old)
                if old in cls.attribute_map and values.get(new, value) != value:
                    raise ConfigError(
                        f"{cls.__name__}: {old}={value!r}, but {new}={values[new]!r}, which is "
                        "another name of the same field; give one of them only"
                    )
                values.setdefault(new, value)
        count, names = values.pop("num_labels", None), values.get("id2label")
        if count is not None and names is None:
            values |= named_labels(count)
        elif count is not None and isinstance(names, Mapping) and count != len(names):
            raise ConfigError(
                f"num_labels={count!r}, but id2label names {len(names)}; give one of them only"
            )
        legacy = {k: values.pop(k) for k in cls.legacy_keys() if k in values}
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}; fields: "
                    f"{sorted(known)}. Pass extra={{{name!r}: ...}} to store it all the same"
                )
        return cls.from_legacy(values, legacy) if legacy else values

    @classmethod
    def accepted_keys(cls) -> set[str]:
        """Every name that the constructor takes: fields, aliases and keys of older files."""
        return {*_names(cls), *ALIASES, *cls.attribute_map, *cls.legacy_keys(), "num_labels"}

    @classmethod
    def legacy_keys(cls) -> tuple[str, ...]:
        """Keys of older files that `from_legacy` folds into fields."""
        return ()

    @classmethod
    def from_legacy(
        cls, values: dict[str, Any], legacy: dict[str, Any], *, wins: bool = False
    ) -> dict[str, Any]:
        """Field values with the legacy keys folded in; `wins` lets them replace what is there."""
        raise NotImplementedError(f"{cls.__name__} names legacy_keys but folds none in")

    @classmethod
    def _changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        legacy = {k: changes.pop(k) for k in cls.legacy_keys() if k in changes}
        if not {"num_labels", "id2label"}.isdisjoint(changes):
            values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
        merged = {**values, **cls._prepared(changes)}
        return cls.from_legacy(merged, legacy, wins=True) if legacy else merged

    def __post_init__(self) -> None:
        if self.id2label is None:
            self.num_labels = 2
        for name, hint in _hints(type(self)).items():
            if name in vars(self):
                check_type(type(self).__name__, name, vars(self)[name], hint)
        self.extra = copy.deepcopy(dict(self.extra))
        hidden = sorted(self.extra.keys() & (self.accepted_keys() - {"extra", *NOT_IN_FILES}))
        if hidden:
            raise ConfigError(
                f"{type(self).__name__}.extra has {hidden}, which are fields and would be hidden "
                "by them; extra is for keys that no field knows. Pass these as arguments"
            )
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError for values out of range or at odds with each other."""
        for name, bounds in type(self).ranges.items():
            check_range(type(self).__name__, name, getattr(self, name, None), bounds)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                "problem_type='single_label_classification' needs num_labels of at least 2, got 1; "
                "use problem_type='regression' for one label"
            )

    def __getattr__(self, name: str) -> Any:
        # only reached where normal lookup failed: a derived field at None, or an alias
        target = type(self).attribute_map.get(name) or (
            ALIASES[name] if ALIASES.get(name) in _names(type(self)) else None
        )
        if target is not None:
            return getattr(self, target)
        compute = _computed(type(self)).get(name)
        if compute is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return compute(self)

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        name = cls.attribute_map.get(name, ALIASES.get(name, name))
        if name in _computed(cls) and (value is None or value is _DERIVED):
            vars(self).pop(name, None)
            return
        if name == "num_labels" or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name == "dtype":
            value = dtype_named(value, cls.__name__)
        elif name == "id2label" and value is not None:
            value = labels_by_number(cls.__name__, value)
        hint = _hints(cls).get(name)
        if hint is None:
            raise AttributeError(
                f"{cls.__name__} has no field {name!r}{did_you_mean(name, _names(cls))}; "
                "model_type and other class constants cannot be set"
            )
        check_type(cls.__name__, name, value, hint)
        object.__setattr__(self, name, value)

    @property
    def num_labels(self) -> int:
        """How many labels `id2label` names; setting it names them LABEL_0, LABEL_1, ..."""
        return len(self.id2label or {})

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        named = named_labels(count)
        self.id2label, self.label2id = named["id2label"], named["label2id"]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """Itself: text models have no sub-configurations."""
        return self

    @property
    def _attn_implementation(self) -> str | None:
        """As transformers' generate reads it."""
        return self.attn_implementation

    def _get_generation_parameters(self) -> dict[str, Any]:
        """None: fields are checked, so that nothing about generation can have been put here."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated like a new one."""
        kept = {
            n: copy.deepcopy(self.__dict__[n]) for n in _names(type(self)) if n in self.__dict__
        }
        return type(self)(**self._changed(kept, changes))

    def running(self, kernels: Any = None, **implementations: str | None) -> Self:
        """A copy that runs on the given backends; None keeps a choice, unless `kernels` is new.

        `implementations` are fields named *_implementation.
        """
        changes: dict[str, Any] = {k: v for k, v in implementations.items() if v is not None}
        if kernels is not None:
            forgotten = dict.fromkeys(name for name in RUNTIME if name != "kernels")
            changes = {**forgotten, **changes, "kernels": kernels}
        return self.replace(**changes)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def to_dict(self) -> dict[str, Any]:
        """Every serialised field, with HF's names and JSON's types; `extra` keys beside them."""
        names = [n for n in _names(type(self)) if n not in (*NOT_IN_FILES, "extra")]
        values = {n: copy.deepcopy(getattr(self, n)) for n in names}
        values["dtype"] = str(self.dtype).removeprefix("torch.") if self.dtype else None
        values["label2id"] = copy.deepcopy(vars(self).get("label2id"))  # as it was given
        return {**copy.deepcopy(self.extra), **values, "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the fields of the base class that are at their default, as HF saves."""
        defaults = {f.name: f.default for f in dataclasses.fields(PreTrainedConfig)}
        values = self.to_dict()
        for name, default in defaults.items():
            plain = values.get(name) == (None if default is MISSING else default)
            two = name == "id2label" and values[name] == named_labels(2)[name]
            if name in values and name != "label2id" and (plain or two):
                del values[name]
        if "id2label" not in values or self.label2id == {}:
            values.pop("label2id", None)
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json."""
        return dumps(self.to_diff_dict() if use_diff else self.to_dict())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, whole or not at all; the directory is made where it is missing."""
        path = Path(directory)
        if path.is_file():
            raise NotADirectoryError(f"{path} is a file; save_pretrained needs a directory")
        self.validate()
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG_FILE, self.to_json_string())

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, allow_model_type_mismatch: bool = False, **overrides: Any
    ) -> Self:
        """A configuration from the content of a config.json; overrides are checked as arguments.

        Keys that no field knows are kept in `extra`; implementation choices in them are ignored.
        Raises ConfigError for a value that does not fit or a file made for another model type.
        """
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type and cls.model_type and not allow_model_type_mismatch:
            raise ConfigError(
                f"the configuration says model_type={found!r}, but {cls.__name__} reads "
                f"{cls.model_type!r}; use AutoConfig, AutoModel or AutoModelForCausalLM, which "
                "choose the class, or pass allow_model_type_mismatch=True"
            )
        accepted = cls.accepted_keys() - {"extra", *NOT_IN_FILES}
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in values.items():
            if key == "model_type" or key.endswith("_implementation") or key == "kernels":
                continue
            (known if key in accepted else extra)[key] = value
        names = known.get("id2label")
        if isinstance(names, Mapping) and known.get("num_labels", len(names)) != len(names):
            logger.warning(
                "num_labels=%r of a file wins over its id2label, which names %d labels",
                known["num_labels"],
                len(names),
            )
            known = {k: v for k, v in known.items() if k not in ("id2label", "label2id")}
        if extra:
            logger.info("%s keeps keys it has no field for: %s", cls.__name__, sorted(extra))
        given = cls._prepared(copy.deepcopy(known))
        return cls(**cls._changed(given, {"extra": copy.deepcopy(extra), **overrides}))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        allow_model_type_mismatch: bool = False,
        **overrides: Any,
    ) -> Any:
        """Read config.json from a directory, or a JSON file; overrides replace its values.

        A path that does not exist may name a repository, see modeling/hub.py.
        Raises FileNotFoundError listing what the directory holds, ConfigError naming the file.
        With `return_unused_kwargs`, returns (config, overrides that no field takes).
        """
        path = local_directory(path, subfolder, CONFIG_ONLY, **hub_options(overrides))
        file, values = read_config(path, subfolder)
        unused = {}
        if return_unused_kwargs:
            takes = cls.accepted_keys()
            unused = {k: overrides.pop(k) for k in list(overrides) if k not in takes}
        try:
            config = cls.from_dict(
                values, allow_model_type_mismatch=allow_model_type_mismatch, **overrides
            )
        except ConfigError as problem:
            raise ConfigError(f"{file}: {problem}") from None
        return (config, unused) if return_unused_kwargs else config


@lru_cache(maxsize=256)
def _hints(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@lru_cache(maxsize=256)
def _names(cls: type[PreTrainedConfig]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


@lru_cache(maxsize=256)
def _computed(cls: type[PreTrainedConfig]) -> dict[str, Callable[[Any], Any]]:
    found = dataclasses.fields(cls)
    return {f.name: f.metadata["compute"] for f in found if "compute" in f.metadata}


PretrainedConfig = PreTrainedConfig
