"""Patch models as they are made: `swathe.patch("llama")`, `swathe.patch(all=True)`.

A model is patched when it has its weights: as `from_pretrained` returns it, or at the end of the
outermost `__init__` of one that is built with weights (`from_config`, a class called). To see that,
two methods of transformers' PreTrainedModel are wrapped while anything is wanted, and put back
afterwards; no class of a model family is touched, and models that exist already stay as they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Self

from transformers import CONFIG_MAPPING, PreTrainedModel

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.hf.patching.report import Report

logger = logging.getLogger(__name__)

Patch = Callable[[PreTrainedModel], Report]
_WRAPPED = ("from_pretrained", "post_init")
_wanted: list[Creation] = []
_originals: dict[str, Any] = {}


@dataclass(eq=False)
class Creation:
    """Models of these types are patched as they are made, until `stop` or the end of a `with`.

    model_types   None for all of them.
    reports       what was done to each model so far, in order, by the name of its class.
    """

    model_types: frozenset[str] | None
    patch: Patch = field(repr=False)
    reports: list[tuple[str, Report]] = field(default_factory=list)

    def stop(self) -> None:
        """Models made from here on are left alone; those made before stay patched."""
        if self in _wanted:
            _wanted.remove(self)
        if not _wanted:
            _unwrap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def takes(self, model: PreTrainedModel) -> bool:
        """Whether a model is of one of the types."""
        return self.model_types is None or model.config.model_type in self.model_types


def patch_created(model_types: str | tuple[str, ...] | None, patch: Patch) -> Creation:
    """Call `patch` on every model of these types (all for None) that is made from here on.

    What is asked for later comes first where two would take a model. Raises ValueError for a type
    that transformers does not know.
    """
    names = _named(model_types)
    for name in names or ():
        if name not in CONFIG_MAPPING:
            raise ValueError(
                f"patch: transformers knows no model_type {name!r}"
                f"{did_you_mean(name, list(CONFIG_MAPPING))}; give one of its configurations' "
                "model_type, a model, or all=True"
            )
    creation = Creation(names, patch)
    _wanted.insert(0, creation)
    if not _originals:
        _wrap()
    return creation


def stop_created(model_types: str | tuple[str, ...] | None) -> None:
    """Stop what `patch_created` was asked with the same types; ValueError where nothing was."""
    names = _named(model_types)
    found = [creation for creation in _wanted if creation.model_types == names]
    if not found:
        asked = [sorted(c.model_types) if c.model_types else "all" for c in _wanted]
        raise ValueError(
            f"unpatch: models of {model_types or 'all types'} are not patched as they are made; "
            f"what was asked for is {asked}"
        )
    for creation in found:
        creation.stop()


def _named(model_types: str | tuple[str, ...] | None) -> frozenset[str] | None:
    if model_types is None:
        return None
    return frozenset((model_types,) if isinstance(model_types, str) else model_types)


def _wrap() -> None:
    for name in _WRAPPED:
        _originals[name] = vars(PreTrainedModel)[name]
    load, finish = _originals["from_pretrained"].__func__, _originals["post_init"]

    @wraps(load)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        found = load(cls, *args, **kwargs)
        _made(found[0] if isinstance(found, tuple) else found)
        return found

    @wraps(finish)
    def post_init(self: PreTrainedModel) -> None:
        finish(self)
        # a model on meta is one that from_pretrained is about to fill, or is to stay without values
        if not any(p.is_meta for p in self.parameters()) and not any(_makers(self)):
            _made(self)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def _unwrap() -> None:
    for name, original in _originals.items():
        setattr(PreTrainedModel, name, original)
    _originals.clear()


def _makers(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Other models whose `__init__` is running: this one is a part of theirs."""
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(maker, PreTrainedModel) and maker is not model:
            yield maker
        frame = frame.f_back  # type: ignore[assignment]


def _made(model: Any) -> None:
    creation = next((c for c in _wanted if c.takes(model)), None)
    if creation is None:
        return
    report = creation.patch(model)
    name = type(model).__name__
    creation.reports.append((name, report))
    logger.info("%s was patched:\n%s", name, report)
