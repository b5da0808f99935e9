"""from_pretrained and save_pretrained: a model from and to a directory in HF's layout.

A model is built without memory (on the meta device), then filled tensor by tensor; nothing is
initialised that is loaded. What a checkpoint lacks, where `strict` lets it, is initialised and
verified.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.checkpoint.reader import Checkpoint, load_into
from swathe.modeling.checkpoint.report import LoadReport
from swathe.modeling.checkpoint.transforms import WeightTransform
from swathe.modeling.checkpoint.writer import save
from swathe.modeling.config import RUNTIME, PreTrainedConfig
from swathe.modeling.config_fields import dtype_named
from swathe.modeling.devices import Placement, place
from swathe.modeling.dispatch import attach
from swathe.modeling.errors import UninitializedParameter
from swathe.modeling.generation.config import GenerationConfig
from swathe.modeling.hub import HUB_OPTIONS, HubMixin
from swathe.modeling.loading_arguments import (
    config_of,
    ignored_names,
    source_directory,
    source_tensors,
)
from swathe.modeling.policy import IMPLEMENTATIONS, KernelPolicy

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

logger = logging.getLogger(__name__)

# HF options that ask for what is always so here, and the values for which that is true
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "disable_mmap": (None, True, False),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True),
    "offload_state_dict": (None, True, False),
    "trust_remote_code": (None, False),
}
# parts of transformers that are not here: what loads such a checkpoint instead
ELSEWHERE = {
    "quantization_config": "quantised weights",
    "gguf_file": "GGUF files",
    "adapter_kwargs": "adapters",
    "load_in_4bit": "quantised weights",
    "load_in_8bit": "quantised weights",
}


class LoadingMixin:
    """The two methods that touch files; `_weight_transforms` say where files and model differ."""

    _weight_transforms: ClassVar[Sequence[WeightTransform]] = ()

    @classmethod
    def from_pretrained(
        cls: type[Any],
        path: str | Path | None,
        *,
        config: PreTrainedConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        attn_implementation: str | None = None,
        norm_implementation: str | None = None,
        rope_implementation: str | None = None,
        mlp_implementation: str | None = None,
        loss_implementation: str | None = None,
        kernels: Any = None,
        strict: str | bool = "head",
        ignore_missing: Sequence[str] = (),
        ignore_unexpected: Sequence[str] = (),
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        subfolder: str = "",
        variant: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> Any:
        """The model stored in directory `path`, in eval mode.

        path: else a hub repository, read with modeling/hub.py's options; or None, for copies of a
        `state_dict` with a `config`. dtype: "auto" is the configuration's, else the first stored
        tensor's; None is fp32. device_map: a device, a dict of modules and devices, or "auto".
        strict: "head" lets a new head's parameters be missing, True nothing, False anything.
        `variant` is in files' names, `key_mapping` patterns of stored names and new ones. Others
        are `__init__`'s or the configuration's. With `output_loading_info` (model, HF's dict).
        Raises FileNotFoundError, ConfigError, CheckpointError naming file and key, or TypeError.
        """
        built_with = {name: options.pop(name) for name in _init_arguments(cls) if name in options}
        overrides = _config_overrides(cls, options)
        directory = source_directory(cls, path, subfolder, config, state_dict, variant, options)
        named = (attn_implementation, norm_implementation, rope_implementation, mlp_implementation)
        backends = _implementations(kernels, named, loss_implementation)
        own = config_of(cls, config, directory).replace(**overrides).running(kernels, **backends)
        checkpoint = source_tensors(directory, variant, state_dict)
        chosen = _dtype(dtype, torch_dtype, own, checkpoint)
        model = _on_meta(cls, own, **built_with)
        placement = place(model, device_map, max_memory, chosen)
        report = _read(
            model,
            checkpoint,
            placement,
            dtype=chosen,
            **ignored_names((cls, config), missing=ignore_missing, unexpected=ignore_unexpected),
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **{"progress": progress, "key_mapping": key_mapping},
        )
        _finish(model, report, chosen, placement, directory)
        model = (model if device_map is None else attach(model, placement)).eval()
        return (model, report.as_dict()) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write config.json and safetensors as HF does, whole or not at all.

        `variant` becomes part of the weight files' names, and others there are kept beside them.
        Tied parameters are stored once, and config.json says what is really tied. Of several
        processes with the same model, only the main one writes. With `push_to_hub`, the model is
        uploaded too, to `repo_id` or a repository named as the directory, with HubMixin's options.
        Raises NotADirectoryError, OSError, or ValueError for tensors that cannot be stored.
        """
        _check_publishing(push_to_hub, repo_id, hub)
        if not is_main_process:
            return
        model: PreTrainedModel = self  # type: ignore[assignment]
        tensors = dict(model.state_dict() if state_dict is None else state_dict)
        shared = {
            name: source
            for name, source in model._tied_weights_keys.items()
            if name in tensors and _same_memory(tensors[name], tensors.get(source))
        }
        changes: dict[str, Any] = {"architectures": [type(model).__name__], "dtype": model.dtype}
        if model._tied_weights_keys:
            changes["tie_word_embeddings"] = bool(shared)
        left_out = {*shared, *model._keys_to_ignore_on_save}
        written = {k: v.detach() for k, v in tensors.items() if k not in left_out}
        config = model.config.replace(**changes)
        generation = self._generation_json()
        extra = {} if generation is None else {"generation_config.json": generation}
        save(
            directory,
            config_json=config.to_json_string(),
            tensors=written,
            max_shard_size=max_shard_size,
            variant=variant,
            extra_files=extra,
            transforms=model._weight_transforms,
        )
        if push_to_hub:
            name = repo_id or Path(directory).resolve().name
            model.push_to_hub(name, max_shard_size=max_shard_size, variant=variant, **hub)

    def _generation_json(self) -> str | None:
        """The text of generation_config.json; None for no such file."""
        generation = getattr(self, "generation_config", None)
        return None if generation is None else str(generation.to_json_string())


def _check_publishing(push_to_hub: bool, repo_id: str | None, hub: Mapping[str, Any]) -> None:
    """Before anything is written: options of an upload are known, and there is an upload."""
    own = set(inspect.signature(LoadingMixin.save_pretrained).parameters) - {"self", "hub"}
    allowed = set(inspect.signature(HubMixin.push_to_hub).parameters) - {"self", *own}
    for name in hub:
        if name not in allowed:
            raise TypeError(
                f"save_pretrained has no argument {name!r}{did_you_mean(name, allowed | own)}; "
                f"allowed: {sorted(own)}, and with push_to_hub=True also {sorted(allowed)}"
            )
    if not push_to_hub and (hub or repo_id):
        raise ValueError(
            f"save_pretrained: {sorted(hub) or ['repo_id']} say how to publish, but push_to_hub is "
            "False; pass push_to_hub=True or leave them out"
        )


def _on_meta(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, **arguments: Any
) -> PreTrainedModel:
    if torch.get_default_device().type == "meta":
        raise RuntimeError(
            "You are using `from_pretrained` with a meta device context manager, which would "
            "discard the weights; leave the context, or use from_config in it"
        )
    with torch.device("meta"):
        return model_class(config, **arguments)


def _read(
    model: PreTrainedModel, checkpoint: Checkpoint, placement: Placement, **options: Any
) -> LoadReport:
    return load_into(
        model,
        checkpoint,
        device=placement.device_of,
        tied=model.tied_parameters(),
        prefix=model.base_model_prefix,
        transforms=model._weight_transforms,
        in_fp32=partial(_in_fp32, model, options["dtype"]),
        **options,
    )


def _in_fp32(model: PreTrainedModel, dtype: torch.dtype, name: str) -> bool:
    """Whether a parameter stays float32 where the model is loaded in `dtype`."""
    parts: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        parts.update(model._keep_in_fp32_modules_strict)
    if dtype == torch.float16:
        parts.update(model._keep_in_fp32_modules)
    return not parts.isdisjoint(name.split("."))


def _init_arguments(cls: type[PreTrainedModel]) -> set[str]:
    """What a model's `__init__` takes by name besides a configuration."""
    others = list(inspect.signature(cls.__init__).parameters.values())[2:]
    return {one.name for one in others if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


def _config_overrides(cls: type[PreTrainedModel], options: dict[str, Any]) -> dict[str, Any]:
    """The part of `**options` for the configuration; an error for a name that nothing takes."""
    own = {*inspect.signature(LoadingMixin.from_pretrained).parameters, *HUB_OPTIONS}
    own = (own | _init_arguments(cls)) - {"path", "options"}
    fields = set(cls.config_class.accepted_keys()) - set(RUNTIME)
    for name, value in options.items():
        if name in ELSEWHERE and value:
            raise NotImplementedError(
                f"{cls.__name__}.from_pretrained: {name}={value!r} asks for {ELSEWHERE[name]}, "
                "which are not read here; load the model with transformers"
            )
        if name in WITHOUT_EFFECT:
            if not any(value is allowed for allowed in WITHOUT_EFFECT[name]):
                why = ": pickles are never read" if name == "use_safetensors" else ""
                raise ValueError(
                    f"{cls.__name__}.from_pretrained: {name}={value!r} is not supported{why}; "
                    f"allowed: {WITHOUT_EFFECT[name]}. Leave the argument out"
                )
        elif name not in {*fields, *HUB_OPTIONS, *ELSEWHERE}:
            near = did_you_mean(name, own | fields)
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no argument {name!r}{near}; allowed: "
                f"{sorted(own)} and fields of {cls.config_class.__name__}"
            )
    if options.get("offload_state_dict"):
        logger.info(
            "offload_state_dict=True changes nothing: weights are always read one by one, straight "
            'to their devices. To keep layers on the CPU use device_map="auto" with max_memory'
        )
    passed_over = {*HUB_OPTIONS, *WITHOUT_EFFECT, *ELSEWHERE}
    return {name: value for name, value in options.items() if name not in passed_over}


def _implementations(
    kernels: Any, named: tuple[str | None, ...], loss: str | None
) -> dict[str, str | None]:
    """Configuration fields of backends named for the first of IMPLEMENTATIONS; checked."""
    KernelPolicy.of(kernels, **dict(zip(IMPLEMENTATIONS, named, strict=False)))
    fields = dict(zip(IMPLEMENTATIONS.values(), named, strict=False))
    return {**fields, "loss_implementation": loss}


def _dtype(
    asked: torch.dtype | str | None,
    alias: torch.dtype | str | None,
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
) -> torch.dtype:
    if asked == "auto" and alias is not None:
        asked = alias
    if asked != "auto":
        return dtype_named(asked, "from_pretrained") or torch.float32
    if config.dtype is not None:
        return config.dtype
    stored = (info.dtype for info in checkpoint.tensors.values())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def _finish(
    model: PreTrainedModel,
    report: LoadReport,
    dtype: torch.dtype,
    placement: Placement,
    directory: Path | None,
) -> None:
    """Missing parameters, buffers and ties on their devices; kernels; how the model generates."""
    model.load_report = report
    if report.missing or report.unexpected or report.mismatched:
        logger.warning("%s: %s", directory or "state_dict", report)
    for name, module in model.named_modules():
        _initialise_missing(model, name, dtype, placement)
        if any(b.is_meta for b in module.buffers(recurse=False)):
            module.reset_buffers(placement.device_of(name))  # type: ignore[operator]
    model.tie_weights()
    model.config.dtype = dtype
    model._adopt(model._kernel_policy)
    if model.can_generate() and directory is not None:
        model.generation_config = GenerationConfig.from_pretrained(directory)


@torch.no_grad()
def _initialise_missing(
    model: PreTrainedModel, path: str, dtype: torch.dtype, placement: Placement
) -> None:
    module = model.get_submodule(path)
    own = dict(module.named_parameters(recurse=False))
    where = {name: placement.device_of(f"{path}.{name}" if path else name) for name in own}
    # a device_map may leave parts on meta, without values
    missing = [name for name, p in own.items() if p.is_meta and where[name].type != "meta"]
    if not missing:
        return
    loaded = {name: p.clone() for name, p in own.items() if not p.is_meta}
    for name in missing:
        full = f"{path}.{name}" if path else name
        own_dtype = torch.float32 if _in_fp32(model, dtype, full) else dtype
        filler = torch.full(own[name].shape, math.nan, dtype=own_dtype, device=where[name])
        setattr(module, name, nn.Parameter(filler, requires_grad=own[name].requires_grad))
    model._init_weights(module)
    for name, value in loaded.items():
        getattr(module, name).copy_(value)
    for name in missing:
        if bool(getattr(module, name).isnan().any()):
            raise UninitializedParameter(
                f"the checkpoint has no {name!r} of a {type(module).__name__} and "
                f"{type(model).__name__}._init_weights does not fill it; add a rule there, or add "
                "the tensor to the checkpoint"
            )


def _same_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape
