"""What a forward returns: fields by name, by position (None skipped) or by key, and a pytree.

The contract is HF's ModelOutput: `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, iteration
over the names of the fields that are set. A field can be set but not dropped. Names and order are
those of HF's classes, with the cache under its older name, past_key_values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cross_cache import EncoderDecoderCache


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

    def __setitem__(self, name: str, value: Any) -> None:
        known = [f.name for f in fields(self)]  # type: ignore[arg-type]
        if name not in known:
            raise KeyError(f"{type(self).__name__} has no field {name!r}; its fields are {known}")
        setattr(self, name, value)

    def _keep(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} keeps its fields: nothing can be deleted or popped; set a "
            "field to None, or make a dict of items() and change that"
        )

    __delitem__ = pop = update = setdefault = _keep

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@dataclass
class BaseModelOutput(ModelOutput):
    """An encoder's result: hidden_states are the embeddings and the output of each layer."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """An encoder's result with one vector a sequence, pooler_output (B, hidden)."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """A decoder's result: hidden_states are the inputs of each layer and the normed last state."""

    last_hidden_state: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """BERT's result, which may come from a decoder with cross-attention."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | StaticCache | EncoderDecoderCache | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """A language model's result: loss where labels were given, logits (B, T or kept, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MoeCausalLMOutputWithPast(ModelOutput):
    """A language model with experts: aux_loss balances them, router_logits (tokens, E) a layer."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """A masked language model's result: logits (B, T, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """An encoder's classification of sequences: logits (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """A decoder's classification of sequences: logits (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DynamicCache | StaticCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """A classification of every token: logits (B, T, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Where an answer starts and ends: logits (B, T) each."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
