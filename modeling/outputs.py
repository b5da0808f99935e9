"""What a forward returns: fields by name, by position (None skipped) or by key, and a pytree.

The contract is HF's ModelOutput: `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, iteration
over the names of the fields that are set. Unlike a dict, an output has no way to drop a field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from swathe.modeling.cache import DynamicCache, StaticCache


def _with_keys(out: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return [(pytree.MappingKey(name), value) for name, value in out.items()], list(out.keys())


class ModelOutput:
    """Base of all results; a subclass is a dataclass whose fields default to None."""

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out.keys())),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_with_keys,
        )

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are set, in the order of declaration."""
        names = tuple(f.name for f in fields(self))  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        """The fields that are set."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """(name, value) of the fields that are set."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    to_tuple = values

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.values()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has no {key!r}; it has {list(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """A body's result: hidden_states are the inputs of each layer and the normed last state."""

    last_hidden_state: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """A language model's result: loss where labels were given, logits (B, T or kept, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
