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
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.checkpoint.reader import Checkpoint, load_into
from swathe.modeling.checkpoint.transforms import WeightTransform
from swathe.modeling.checkpoint.writer import save
from swathe.modeling.config import RUNTIME, PreTrainedConfig
from swathe.modeling.config_fields import dtype_named
from swathe.modeling.errors import UninitializedParameter
from swathe.modeling.generation.config import GenerationConfig
from swathe.modeling.policy import IMPLEMENTATIONS, KernelPolicy

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

logger = logging.getLogger(__name__)

# HF options that ask for what is always so here, and the values for which that is true
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True),
    "offload_state_dict": (None, True, False),
    "local_files_only": (None, True, False),
    "trust_remote_code": (None, False),
}


class LoadingMixin:
    """The two methods that touch files; `_weight_transforms` say where files and model differ."""

    _weight_transforms: ClassVar[Sequence[WeightTransform]] = ()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
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
        progress: bool = True,
        **options: Any,
    ) -> Any:
        """The model stored in directory `path`, in eval mode.

        dtype: "auto" is the configuration's, else that of the first stored tensor; None is fp32.
        device_map: one device for all. strict: "head" lets parameters of a new head be missing,
        True nothing, False anything. Other keyword arguments replace configuration values.
        Raises FileNotFoundError, ConfigError, CheckpointError naming file and key, or TypeError for
        an unknown argument. With `output_loading_info`, returns (model, HF's dict of key sets).
        """
        model_class: type[PreTrainedModel] = cls  # type: ignore[assignment]
        _refuse_meta_context()
        overrides = _config_overrides(model_class, options)
        device, directory = _single_device(device_map), Path(path) / subfolder
        named = (attn_implementation, norm_implementation, rope_implementation, mlp_implementation)
        backends = _implementations(kernels, named, loss_implementation)
        stored = config or model_class.config_class.from_pretrained(directory)
        own = stored.replace(**overrides).running(kernels, **backends)
        checkpoint = Checkpoint.open(directory)
        chosen = _dtype(dtype, torch_dtype, own, checkpoint)
        with torch.device("meta"):
            model = model_class(own)
        report = load_into(
            model,
            checkpoint,
            dtype=chosen,
            device=device,
            tied=model.tied_parameters(),
            prefix=model.base_model_prefix,
            ignore_missing=_patterns("missing", ignore_missing, cls, config),
            ignore_unexpected=_patterns("unexpected", ignore_unexpected, cls, config),
            strict=strict,  # type: ignore[arg-type]
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            progress=progress,
            transforms=model._weight_transforms,
        )
        _finish(model, chosen, device, directory)
        _warn(path, report)
        return (model.eval(), report.as_dict()) if output_loading_info else model.eval()

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write config.json and safetensors as HF does, whole or not at all.

        Tied parameters are stored once, and config.json says what is really tied. Raises
        NotADirectoryError, OSError, or ValueError for tensors that cannot be stored.
        """
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
        written = {k: v.detach() for k, v in tensors.items() if k not in shared}
        config = model.config.replace(**changes)
        extra = {}
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            extra["generation_config.json"] = generation.to_json_string()
        save(
            directory,
            config_json=config.to_json_string(),
            tensors=written,
            max_shard_size=max_shard_size,
            extra_files=extra,
            transforms=model._weight_transforms,
        )


def _refuse_meta_context() -> None:
    if torch.get_default_device().type == "meta":
        raise RuntimeError(
            "You are using `from_pretrained` with a meta device context manager, which would "
            "discard the weights; leave the context, or use from_config in it"
        )


def _patterns(what: str, given: Sequence[str], *holders: object) -> tuple[str, ...]:
    """Names to ignore: the argument's, the class's, and those a caller set on the config."""
    name = f"_keys_to_ignore_on_load_{what}"
    return (*given, *(pattern for holder in holders for pattern in getattr(holder, name, ())))


def _config_overrides(cls: type[PreTrainedModel], options: dict[str, Any]) -> dict[str, Any]:
    """The part of `**options` for the configuration; TypeError for a name that nothing takes."""
    own = set(inspect.signature(LoadingMixin.from_pretrained).parameters) - {"path", "options"}
    fields = set(cls.config_class.accepted_keys()) - set(RUNTIME)
    for name, value in options.items():
        if name in WITHOUT_EFFECT:
            if not any(value is allowed for allowed in WITHOUT_EFFECT[name]):
                raise ValueError(
                    f"{cls.__name__}.from_pretrained: {name}={value!r} is not supported; allowed: "
                    f"{WITHOUT_EFFECT[name]}. Leave the argument out"
                )
        elif name not in fields:
            near = did_you_mean(name, own | fields)
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no argument {name!r}{near}; allowed: "
                f"{sorted(own)} and fields of {cls.config_class.__name__}"
            )
    return {k: v for k, v in options.items() if k not in WITHOUT_EFFECT}


def _implementations(
    kernels: Any, named: tuple[str | None, ...], loss: str | None
) -> dict[str, str | None]:
    """Configuration fields of backends named for ops (in the order of IMPLEMENTATIONS); checked."""
    KernelPolicy.of(kernels, **dict(zip(IMPLEMENTATIONS, named, strict=True)))
    fields = dict(zip(IMPLEMENTATIONS.values(), named, strict=True))
    return {**fields, "loss_implementation": loss}


def _warn(path: str | Path, report: Any) -> None:
    if report.missing or report.unexpected or report.mismatched:
        logger.warning("%s: %s", path, report)


def _single_device(device_map: object) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(
                f"device_map={dict(device_map)!r}: splitting a model over devices is not "
                'supported; pass one device, such as "cuda:0" or {"": "cuda:0"}'
            )
        device_map = device_map[""]
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, bool) or not isinstance(device_map, str | int | torch.device):
        raise TypeError(f"device_map={device_map!r}; it must name one device, such as 'cuda:0'")
    try:
        return torch.device(device_map)
    except RuntimeError:
        raise ValueError(
            f"device_map={device_map!r} names no device; allowed: one device such as 'cpu', "
            "'cuda:0' or 0"
        ) from None


def _dtype(
    asked: torch.dtype | str | None,
    alias: torch.dtype | str | None,
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
) -> torch.dtype:
    if asked == "auto" and alias is not None:
        asked = alias
    if asked != "auto":
        chosen = dtype_named(asked, "from_pretrained") or torch.float32
        if not chosen.is_floating_point:
            raise ValueError(f"dtype={asked!r}: weights load as floating point; use torch.bfloat16")
        return chosen
    if config.dtype is not None:
        return config.dtype
    stored = (info.dtype for info in checkpoint.tensors.values())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def _finish(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device, directory: Path
) -> None:
    """Missing parameters, buffers and ties on the device; kernels; how the model generates."""
    for module in model.modules():
        _initialise_missing(model, module, dtype, device)
        if any(b.is_meta for b in module.buffers(recurse=False)):
            module.reset_buffers(device)  # type: ignore[operator]
    model.tie_weights()
    model.config.dtype = dtype
    model._adopt(model._kernel_policy)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(directory)


@torch.no_grad()
def _initialise_missing(
    model: PreTrainedModel, module: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    own = dict(module.named_parameters(recurse=False))
    missing = [name for name, parameter in own.items() if parameter.is_meta]
    if not missing:
        return
    loaded = {name: p.clone() for name, p in own.items() if not p.is_meta}
    for name in missing:
        filler = torch.full(own[name].shape, math.nan, dtype=dtype, device=device)
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
