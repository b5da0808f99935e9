"""One of transformers' language models as our loop wants it: caches, inputs, what a step is.

The model's own forward runs, with the arguments that transformers' `generate` passes for a text.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from swathe.modeling.errors import ConfigError
from swathe.modeling.generation import graph
from swathe.modeling.generation.generate import GenerateOutput, GenerationMixin
from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.hf.decoding.cache import FixedCache, GrowingCache
from swathe.modeling.hf.decoding.replay import hindrance
from swathe.modeling.hf.masks import unbroken_padding

_Theirs: Any = transformers.GenerationMixin
_CACHES = ("cache", "past_key_values", "cache_params")  # what forwards call it, by version
_OF_THE_MODEL = ("parameters", "buffers", "modules", "named_modules", "training", "device")


class Stock(GenerationMixin):
    """A transformers model, held weakly, in the place of one of ours.

    Raises ConfigError for models that this loop cannot decode, with the reason.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.takes = frozenset(signature(model.forward).parameters)
        _refuse(model, self.takes)
        self.cache_name = next(name for name in _CACHES if name in self.takes)
        self._held = weakref.ref(model)
        self._found: tuple[Any, str | None] | None = None
        self._told: str | None = None

    @property
    def model(self) -> Any:
        """The model, which whoever calls holds."""
        return self._held()

    @property
    def config(self) -> Any:
        """Its text's configuration."""
        return self.model.config.get_text_config(decoder=True)

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_THE_MODEL:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.model, name)

    def decode(self, input_ids: Tensor | None, **options: Any) -> Tensor | GenerateOutput:
        """`generate` in eval mode, over the cache that serves best; see hf/decode.py."""
        with self._evaluating():
            options["cache_implementation"] = self._cache(**options)
            return self.generate(input_ids, **options)

    def _cache(
        self,
        cache_implementation: str | None = None,
        cuda_graph: Any = "auto",
        **_: Any,
    ) -> str | None:
        name = type(self.model).__name__
        if cache_implementation == "static":
            reason = self.why_uncaptured()
            if reason is not None:
                raise ValueError(
                    f"cache_implementation='static' is for steps that are all the same, and those "
                    f"of {name} are not: {reason}; leave it out"
                )
        captured = self.device.type in graph.CAPTURING and cuda_graph is not False
        if cache_implementation is not None or not captured:
            return cache_implementation
        reason = graph.hindrance(self, "static")
        if reason is None or cuda_graph is True:  # which generate refuses, with the reason
            return "static"
        if reason != self._told:
            self._told = reason
            warnings.warn(
                f"generate decodes {name} without a CUDA graph: {reason}. Pass cuda_graph=False "
                "where that is as it should be",
                stacklevel=4,
            )
        return None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        trained = [module for module in self.modules() if module.training]
        for module in trained:
            module.training = False
        try:
            yield
        finally:
            for module in trained:
                module.training = True

    def new_cache(self, prompt: Prompt, room: int | None) -> Any:
        """transformers' own growing cache, or one of fixed room."""
        config = self.model.config
        if room is not None:
            fixed = FixedCache(config, room, self.device)
            fixed.holes = prompt.holes
            return fixed
        growing = GrowingCache(config=config)
        growing.holes, growing.rows = prompt.holes, len(prompt.ids) // prompt.times
        return growing

    @contextmanager
    def _modes(self, step: bool, holes: bool) -> Iterator[None]:
        with ExitStack() as modes:
            if step:  # transformers computes many experts otherwise than in a prefill
                modes.enter_context(self.model._optimize_model_for_decode())
            if not holes:
                modes.enter_context(unbroken_padding())
            yield

    def why_uncaptured(self) -> str | None:
        """What decoding/replay.py finds, once for a model as it is."""
        now = (graph.facts(self), graph.CAPTURING)
        if self._found is None or self._found[0] != now:
            self._found = now, hindrance(self)
        return self._found[1]

    def step_settings(self) -> tuple[Any, ...]:
        """Implementations that configurations name, and forwards put on instances."""
        configs = [m.config for m in self.modules() if isinstance(m, transformers.PreTrainedModel)]
        names = ("_attn_implementation", "_experts_implementation")
        chosen = (getattr(config, name, None) for config in configs for name in names)
        return (*chosen, *(vars(m).get("forward") for m in self.modules()))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        **options: Any,
    ) -> Any:
        """The outputs for tokens (B, T); a FixedCache has a step's mask and positions."""
        B, T = input_ids.shape
        if attention_mask is not None and "attention_mask" not in self.takes:
            raise ValueError(
                f"{type(self.model).__name__} takes no attention_mask, so that rows cannot be "
                "padded; generate from rows of one length"
            )
        if position_ids is None:
            position_ids = torch.arange(T, device=input_ids.device)[None]
        position_ids = position_ids.expand(B, T)
        fixed = past_key_values if isinstance(past_key_values, FixedCache) else None
        if fixed is not None:
            attention_mask, position_ids = fixed.begin(attention_mask, position_ids)
        layers = past_key_values.layers
        if T == 1 and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            attention_mask = None  # there is no key that it could hide
        given = {
            **options,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self.cache_name: past_key_values,
        }
        try:
            with self._modes(step=T == 1, holes=past_key_values.holes):
                out = self.model(**{k: v for k, v in given.items() if k in self.takes})
        except Exception as error:
            error.add_note(
                f"While swathe.generate decoded a {type(self.model).__name__} by its own forward; "
                "what that needs beside tokens and their cache, model.generate may give it"
            )
            raise
        if fixed is not None:
            fixed.end(T)
        return out


def _refuse(model: Any, takes: frozenset[str]) -> None:
    reason = None
    if not model.can_generate():
        reason = "it has no head that generates text"
    elif model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder, and starts from what its encoder has read"
    elif type(model).generate is not _Theirs.generate:
        reason = "its class has another generate than transformers' models in general"
    elif model.main_input_name != "input_ids":
        reason = f"it starts from {model.main_input_name}, not from tokens"
    elif takes.isdisjoint(_CACHES) or not model._supports_default_dynamic_cache():
        reason = "it keeps what it has read in no cache of transformers' common kinds"
    elif not hasattr(model.config.get_text_config(decoder=True), "num_hidden_layers"):
        reason = "its configuration does not say how many layers a cache is for"
    if reason is not None:
        raise ConfigError(
            f"generate cannot decode a {type(model).__name__}: {reason}; call model.generate"
        )
