"""Every public model class of every family, with a tiny configuration."""

from __future__ import annotations

from typing import Any

from support.families import FAMILIES, TINY
from support.tiny_bert import TINY as TINY_BERT
from swathe.modeling.auto import HEADS, model_class
from swathe.modeling.errors import ConfigError
from swathe.modeling.families import __all__ as PUBLIC

MODEL_TYPES = (*FAMILIES, "bert")


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a tiny configuration, transformers' as well as ours."""
    own = TINY_BERT if model_type == "bert" else {**TINY, **FAMILIES[model_type][1]}
    return {**own, **changes}


def config_of(model_type: str, **changes: Any) -> Any:
    """Our tiny configuration."""
    return model_class(model_type, "config")(**tiny(model_type, **changes))


def _found() -> dict[str, tuple[str, str]]:
    found = {}
    for model_type in MODEL_TYPES:
        for head in HEADS:
            try:
                found[model_class(model_type, head).__name__] = (model_type, head)
            except ConfigError:
                continue
    return found


# class name: (model_type, head)
CLASSES = _found()
assert set(CLASSES) == {name for name in PUBLIC if not name.endswith("Config")}


def build(name: str, **changes: Any) -> Any:
    """The model of that class, in eval mode."""
    model_type, head = CLASSES[name]
    return model_class(model_type, head)(config_of(model_type, **changes)).eval()
