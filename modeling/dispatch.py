"""A model on several devices: hooks that move what a module is given to where its weights are.

Every largest module whose weights share a device gets a pre-hook, so a boundary costs one copy of
the stream and, once a forward, of the mask and the angles. A cache needs none: each layer writes
keys and values where it computed them.

    inputs      go to `model.device`, the device of the first parameter; labels to the head's
    results     come back to `model.device`; the cache stays where it is
    last state  goes from the body to the language-model head, which is never hooked, since a fused
                loss reads its weight without calling it; for other heads, to `model.device`
    kernels     are chosen for each module's own device; angles that change devices are turned by
                a backend that is chosen there
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from swathe.kernels.core.registry import AUTO, Choice, on_change
from swathe.kernels.rotary.api import resolve_rotary
from swathe.modeling.devices import Placement, place
from swathe.modeling.layers.embedding import RotaryEmbedding, Rotation

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
_LABELS = ("labels", "shift_labels", "num_items_in_batch", "start_positions", "end_positions")


class DispatchMixin(nn.Module):
    """What a model on several devices refuses; `hf_device_map` is set by a load with device_map."""

    hf_device_map: dict[str, int | str]

    def is_dispatched(self) -> bool:
        """Whether the model's parameters were spread over several devices."""
        return len(set(getattr(self, "hf_device_map", {}).values())) > 1

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's; RuntimeError where it would gather a model that is on several devices."""
        devices = (str, int, torch.device, Tensor)
        given = [a for a in args if isinstance(a, devices) and not isinstance(a, bool)]
        if given or any(kwargs.get(name) is not None for name in ("device", "tensor")):
            self._refuse_to_gather(f".to({given[0] if given else kwargs})")
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """As torch's; RuntimeError where it would gather a model that is on several devices."""
        self._refuse_to_gather(".cuda()")
        return super().cuda(device)

    def cpu(self) -> Self:
        """As torch's; RuntimeError where it would gather a model that is on several devices."""
        self._refuse_to_gather(".cpu()")
        return super().cpu()

    def _refuse_to_gather(self, call: str) -> None:
        if self.is_dispatched():
            raise RuntimeError(
                f"You can't move a model that is spread over several devices: {call} on a model "
                f"with hf_device_map {self.hf_device_map}. Load it again with device_map set to "
                "one device; dtypes may be changed, as in .to(torch.bfloat16)"
            )


def dispatch_model(
    model: Model, device_map: object, max_memory: Mapping[Any, int | str] | None = None
) -> Model:
    """Move a model that is in memory to the devices of `device_map` (modeling/devices.py).

    `from_pretrained(device_map=...)` reads weights straight to theirs and never has them twice:

        model = LlamaForCausalLM.from_pretrained(path, device_map="auto")
        model = dispatch_model(model, {"model": 0, "lm_head": "cpu"})

    Returns the model, changed in place. Raises ValueError and TypeError as `devices.place`, and
    RuntimeError for a model that is on several devices already.
    """
    model._refuse_to_gather("dispatch_model")
    placement = place(model, device_map, max_memory)
    for name, module in model.named_modules():
        dotted = f"{name}." if name else ""
        for own, parameter in module.named_parameters(recurse=False):
            value = parameter.data.to(placement.device_of(dotted + own))
            if torch._has_compatible_shallow_copy_type(parameter, value):  # type: ignore[attr-defined]
                parameter.data = value  # the same Parameter, for optimisers that hold it
            else:
                setattr(module, own, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for own, buffer in module.named_buffers(recurse=False):
            module._buffers[own] = buffer.to(placement.device_of(dotted + own))
    model.tie_weights()
    model._adopt(model._kernel_policy)
    return attach(model, placement)


def attach(model: Model, placement: Placement) -> Model:
    """Register the hooks of a model whose tensors lie as `placement` says, where it needs any."""
    model.hf_device_map = placement.as_hf()
    if len(placement.devices()) < 2:
        return model
    for angles in (m for m in model.modules() if isinstance(m, RotaryEmbedding)):
        for device in placement.devices():  # a backend that cannot serve says so now
            _rotary_on(device, angles.choice.asked, model.dtype, angles.head_dim)
    moves = _Moves()
    head = model.get_output_embeddings()
    labels = list((model if head is None else head).parameters())[-1].device
    for module, device in _boundaries(model, placement):
        if module is not head or "." in model.head_path:
            module.register_forward_pre_hook(_Into(device, moves), with_kwargs=True)
    names = list(inspect.signature(model.forward).parameters)
    start = _Start(placement.main, labels, moves, names)
    model.register_forward_pre_hook(start, with_kwargs=True)
    model.register_forward_hook(_Results(placement.main, moves))
    if model.base_model is not model:
        # other heads pick tokens by input_ids first, which are on `main`
        reader = placement.main if head is None else labels
        model.base_model.register_forward_hook(_LastState(reader, moves))
    return model


class _Moves:
    """Copies on other devices, each made once for as long as its original lives."""

    def __init__(self) -> None:
        self.made: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[_Moves], tuple[()]]:
        return _Moves, ()

    def move(self, value: Any, device: torch.device) -> Any:
        """`value` with every tensor in it on `device`; itself where nothing has to move."""
        if isinstance(value, Tensor):
            if value.device == device or value.is_meta:
                return value
            return self._once(value, device)
        if isinstance(value, Rotation):
            cos, sin = self.move(value.cos, device), self.move(value.sin, device)
            if cos is value.cos:
                return value
            choice = _rotary_on(device, value.choice.asked, cos.dtype, cos.shape[-1])
            return value._replace(cos=cos, sin=sin, choice=choice)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.move(item, device) for item in value))
        if isinstance(value, tuple | list):
            return type(value)(self.move(item, device) for item in value)
        if isinstance(value, dict):
            return {key: self.move(item, device) for key, item in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Choice):
            return self._once(value, device)
        return value

    def _once(self, value: Any, device: torch.device) -> Any:
        key = (device, torch.is_grad_enabled())
        found = self.made.get(value, {}).get(key)
        if found is None:
            is_tensor = isinstance(value, Tensor)
            found = value.to(device) if is_tensor else self._fields(value, device)
            if found is not value:  # else it would hold itself
                self.made.setdefault(value, {})[key] = found
        return found

    def _fields(self, value: Any, device: torch.device) -> Any:
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = {name: self.move(item, device) for name, item in old.items()}
        changed = any(new[name] is not old[name] for name in old)
        return dataclasses.replace(value, **new) if changed else value


@dataclasses.dataclass
class _Into:
    """Pre-hook: all arguments to a module's device."""

    device: torch.device
    moves: _Moves

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.moves.move(args, self.device), self.moves.move(kwargs, self.device)


@dataclasses.dataclass
class _Start:
    """Pre-hook of the model: a new forward, whose labels go to the head and the rest to `main`."""

    main: torch.device
    labels: torch.device
    moves: _Moves
    names: list[str]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.moves.made.clear()
        move = self.moves.move
        return (
            tuple(move(a, self._of(n)) for n, a in zip(self.names, args, strict=False)),
            {name: move(value, self._of(name)) for name, value in kwargs.items()},
        )

    def _of(self, name: str) -> torch.device:
        return self.labels if name in _LABELS else self.main


@dataclasses.dataclass
class _Results:
    """Hook of the model: all results to `main`."""

    main: torch.device
    moves: _Moves

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.moves.move(output, self.main)


@dataclasses.dataclass
class _LastState:
    """Hook of the body: the last state to where it is read."""

    reader: torch.device
    moves: _Moves

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        state = getattr(output, "last_hidden_state", None)
        if state is None:
            return output
        return dataclasses.replace(output, last_hidden_state=self.moves.move(state, self.reader))


def _boundaries(model: nn.Module, placement: Placement) -> Iterator[tuple[nn.Module, torch.device]]:
    """The largest modules below the model that are called and whose tensors share a device."""
    stack = [(name, module) for name, module in model.named_children()]
    while stack:
        name, module = stack.pop()
        tensors = [*module.named_parameters(), *module.named_buffers()]
        devices = {placement.device_of(f"{name}.{tensor}") for tensor, _ in tensors}
        if len(devices) == 1 and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module, devices.pop()
        else:
            stack += [(f"{name}.{child}", below) for child, below in module.named_children()]


@lru_cache(maxsize=64)
def _rotary_on(device: torch.device, asked: str, dtype: torch.dtype, size: int) -> Choice:
    """The backend that turns angles on `device`, asked for as it was on theirs."""
    like = torch.empty(1, 1, 1, size, dtype=dtype, device=device)
    # on meta nothing runs, so that any name would do
    return resolve_rotary(like, like[0], AUTO if device.type == "meta" else asked)


on_change(_rotary_on.cache_clear)
