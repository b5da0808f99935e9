"""The bridge to transformers' `generate`: beam search, assisted decoding, every one of its options.

`with_generate(model)` puts a class of its own before the model's: HFGenerate, which is what
transformers' loops ask of a model beside `forward`. Nothing else about the model changes.

caches    transformers makes its own (dynamic, sliding, offloaded, quantized; modeling/
          cache_protocol.py), but for "static", where ours waits for no device and can be compiled.
          Any cache that is handed in is used.
forward   takes `cache`, the newer name of `past_key_values`, as well.
"""
# transformers types `self` of its mixin by a protocol that only its own models meet
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, NoReturn, TypeVar

import torch
import transformers
from torch import Tensor

from swathe.modeling.cache import StaticCache
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder_config import FULL, SLIDING
from swathe.modeling.generation.config import GenerationConfig
from swathe.modeling.model import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)
_Theirs = transformers.GenerationMixin
_INPUTS = signature(_Theirs.prepare_inputs_for_generation).parameters
# what the loops call the cache: transformers renamed it
CACHE = "cache" if "cache" in _INPUTS else "past_key_values"
# what the loops hand on to forward, where transformers' own models ignore it
_NOT_FOR_FORWARD = ("tokenizer", "assistant_tokenizer", "synced_gpus", "cache_position")


@dataclass
class _Kept:
    """What `without_generate` puts back, and the generation_config as it was made from that."""

    own: GenerationConfig | None
    made: transformers.GenerationConfig


class HFGenerate(_Theirs):
    """What transformers' GenerationMixin asks of a model; stands before the model's own class."""

    _is_stateful = False
    _kept: _Kept
    config: Any
    generation_config: Any
    _compiled: tuple[Any, Callable[..., Any]] | None = None

    def __call__(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        """As the model's; `cache` is another name of `past_key_values`."""
        if cache is not None:
            kwargs["past_key_values"] = cache
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @wraps(_Theirs.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' inputs of one forward, under the names that our forwards have."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        for name in _NOT_FOR_FORWARD:
            inputs.pop(name, None)
        cache = inputs["past_key_values"] = inputs.pop(CACHE, None)
        mask = inputs.get("attention_mask")
        if isinstance(cache, StaticCache) and mask is not None:
            # the cache keeps no padding: the new tokens' part is enough, and its size never changes
            new = inputs.get("input_ids")
            T = (inputs["inputs_embeds"] if new is None else new).shape[1]
            inputs["attention_mask"] = mask[:, -T:].contiguous()
        return inputs

    def create_masks_for_generate(
        self, *, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor | None:
        """The (B, S) mask as it is: our forwards make of it what a cache needs."""
        return attention_mask

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        given = model_kwargs.get(CACHE)
        if given is not None:
            if kind is not None:
                raise ValueError(
                    f"generate was given a {type(given).__name__} and cache_implementation="
                    f"{kind!r}; pass one of them"
                )
            given._is_user_defined = True  # the loops then leave it as the caller expects it
            return
        if generation_config.use_cache is False:
            return
        longest = getattr(generation_config, "max_cache_len", None) or 0
        cache = new_cache(self.config, kind, max(max_cache_length, longest), generation_config)
        if getattr(generation_config, "is_assistant", False):
            past_recording = getattr(cache, "activate_past_recording", None)
            if past_recording is not None:
                past_recording()
        model_kwargs[CACHE] = cache

    def _valid_auto_compile_criteria(
        self, model_kwargs: dict[str, Any], generation_config: Any
    ) -> bool:
        # with another static cache a forward waits for its length, which breaks the graph
        ours = isinstance(model_kwargs.get(CACHE), StaticCache)
        theirs: Any = super()
        return ours and bool(theirs._valid_auto_compile_criteria(model_kwargs, generation_config))

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """`__call__` compiled as the transformers.CompileConfig says; kept until that changes."""
        wanted = (compile_config or transformers.CompileConfig()).to_dict()
        if self._compiled is None or self._compiled[0] != wanted:
            self._compiled = wanted, torch.compile(self.__call__, **wanted)
        return self._compiled[1]

    def _optimize_model_for_decode(self) -> Any:
        return nullcontext()  # it switches how transformers' own experts run

    @classmethod
    def is_remote_code(cls) -> bool:
        """No model of swathe is."""
        return False

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: continuous batching swaps transformers' own attention for a paged one."""
        raise NotImplementedError(
            "continuous batching (generate_batch, cache_implementation='paged') works inside "
            "transformers' own attention layers; use generate with cache_implementation 'dynamic' "
            "or 'static', or load the model with transformers"
        )

    init_continuous_batching = generate_batch

    def _generation_json(self) -> str | None:
        """As without the bridge, unless `generation_config` was changed meanwhile."""
        own = self._kept.own
        if self.generation_config != self._kept.made:
            return str(self.generation_config.to_json_string())
        return None if own is None else own.to_json_string()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class has the name of the model's own, so that it cannot be found by it
        return _rebuilt, (type(self).__bases__[1],), self.__getstate__()


def with_generate(model: Model) -> Model:
    """Give a language model transformers' `generate`, in place; returns the model.

        model = swathe.hf.with_generate(swathe.LlamaForCausalLM.from_pretrained(path))
        model.generate(ids, num_beams=3, max_new_tokens=20)

    It stays an instance of its class, and what `save_pretrained` writes stays the same.
    `generation_config` becomes a transformers.GenerationConfig with what the file, or else the
    configuration, says: sampling options of a file are now applied. Raises TypeError for anything
    but a language model of swathe.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"with_generate was given a {type(model).__name__}; it takes a language model of "
            "swathe, such as LlamaForCausalLM. Models of transformers have generate already"
        )
    if isinstance(model, HFGenerate):
        return model
    own = model.generation_config
    made = theirs_of(own, model.config)
    bridged: Any = model
    bridged.__class__ = _class_of(type(model))
    bridged._kept, bridged.generation_config = _Kept(own, copy.deepcopy(made)), made
    return model


def without_generate(model: Model) -> Model:
    """Undo `with_generate`: the model has its own class, generate and generation_config again."""
    if isinstance(model, HFGenerate):
        bridged: Any = model
        bridged.generation_config = bridged._kept.own
        bridged.__dict__.pop("_compiled", None)
        del bridged._kept
        bridged.__class__ = type(model).__bases__[1]
    return model


def theirs_of(
    own: GenerationConfig | None, config: PreTrainedConfig
) -> transformers.GenerationConfig:
    """What transformers would read from the same files."""
    if own is None:
        return transformers.GenerationConfig.from_model_config(config.to_dict())  # type: ignore[arg-type]
    return transformers.GenerationConfig.from_dict(json.loads(own.to_json_string()))


def new_cache(config: Any, kind: str | None, room: int, options: Any) -> Any:
    """The cache that `cache_implementation` names, for a model of swathe.

    `room` is what a static one holds; `options` the GenerationConfig, for its cache_config.
    """
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    layers: dict[str, Any] = {
        "num_hidden_layers": len(windows),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }
    theirs = transformers.PretrainedConfig(**layers)
    if kind == "quantized":
        given = dict(options.cache_config or {})
        given.setdefault("config", theirs)
        return transformers.QuantizedCache(backend=given.pop("backend", "quanto"), **given)
    if kind == "offloaded_static":
        return transformers.StaticCache(config=theirs, max_cache_len=room, offloading=True)
    if kind in (None, "dynamic", "dynamic_full", "offloaded"):
        return transformers.DynamicCache(config=theirs, offloading=kind == "offloaded")
    return StaticCache(config, room)  # "static" and its older names


@lru_cache
def _class_of(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    made: type[PreTrainedModel] = metaclass(cls.__name__, (HFGenerate, cls), names)
    return made


def _rebuilt(cls: type[PreTrainedModel]) -> PreTrainedModel:
    """An empty instance for copy and pickle to fill."""
    made = _class_of(cls)
    return made.__new__(made)
