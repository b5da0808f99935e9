"""A decoder's layers as one call: for some new tokens on a cache, on a CPU, in inference.

Between two tokens nothing changes but numbers, so the calls that the layers make to the C++ library
are recorded once (kernels/core/program.py) and run again for each token; Python's share of a layer
falls from a tenth of a millisecond to a few microseconds. The calls are the layers' own, and so are
the results, bit for bit, but for projections so small that a loop leaves them to torch. A recording
lasts as long as its cache has room and its model stays as it was: parameters, modules, hooks and
backends are looked at before every run.

Layers that need anything but the C++ library (mixtures of experts, windows, backends of another
name) run as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.kernels.core.program import NotRecordable, append, recording
from swathe.modeling.cache import DynamicCache
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.layers.linear import being_read

ROWS = 16  # tokens of all sequences; more are bound by products, not by Python
Stream = tuple[Tensor, Tensor]
_recordings: WeakKeyDictionary[DynamicCache, RecordedLayers] = WeakKeyDictionary()
# what was tried in vain: numbers of sequences and of tokens, and the policy of the time
_refused: WeakKeyDictionary[DynamicCache, list[tuple[int, int, Any]]] = WeakKeyDictionary()


def run_recorded(
    body: Any,
    layers: list[Any],
    hidden: Tensor,
    rotations: Mapping[str, Rotation],
    mask: Mask,
    cache: Any,
) -> Stream | None:
    """The stream after `layers`, and the cache with the new tokens; None where they must run."""
    B, T, _ = hidden.shape
    if (
        hidden.device.type != "cpu"
        or B * T > ROWS
        or type(cache) is not DynamicCache
        or torch.is_grad_enabled()
        or body.training
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or not mask.interval
        or mask.places is not None
        or not cache.has_room(len(layers), B, T)
    ):
        return None
    found = _recordings.get(cache)
    if found is None or not found.fits(body, layers, hidden, rotations, mask, cache):
        trial, refused = (B, T, body._kernel_policy), _refused.setdefault(cache, [])
        if trial in refused:
            return None
        try:
            found = RecordedLayers(body, layers, hidden, rotations, mask, cache)
        except NotRecordable:
            refused.append(trial)
            return None
        _recordings[cache] = found
    return found.run(hidden, rotations, mask, cache)


class _Recorder:
    """The cache as layers see it while they are recorded: its whole buffers."""

    def __init__(self, cache: DynamicCache, position: array[int]) -> None:
        self.cache, self.position = cache, position

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append k and v where `position` will say."""
        keys, values = self.cache.buffers(layer_idx)
        append(k, keys, self.position)
        append(v, values, self.position)
        return keys, values


class RecordedLayers:
    """The program of one model on one cache, for one number of sequences and new tokens."""

    def __init__(
        self,
        body: Any,
        layers: list[Any],
        hidden: Tensor,
        rotations: Mapping[str, Rotation],
        mask: Mask,
        cache: DynamicCache,
    ) -> None:
        if any(layer.window is not None for layer in layers):
            raise NotRecordable("a sliding window")
        if any(layer.self_attn.layer_idx != i for i, layer in enumerate(layers)):
            raise NotRecordable("layers that share a layer of the cache")
        self.hidden = hidden.clone()
        self.rotations = {
            name: r._replace(cos=r.cos.clone(), sin=r.sin.clone()) for name, r in rotations.items()
        }
        self.position = array("q", [0])
        self.layers, self.policy = layers, body._kernel_policy
        self.threads = torch.get_num_threads()
        self.int8 = being_read()
        self.buffers = [cache.buffers(i) for i in range(len(layers))]
        T, capacity = hidden.shape[1], self.buffers[0][0].shape[2]
        first, last = _bounds(mask, hidden, cache)
        self.bounds = first.clone(), last.clone()
        shown = Mask()
        shown._bounds[T, capacity, hidden.device] = self.bounds
        self.modules = _children(layers)
        self.parameters = _parameters(layers)
        with recording() as self.program:
            stream, residual = self.hidden, None
            recorder: Any = _Recorder(cache, self.position)
            for layer in layers:
                rotation = self.rotations[layer.layer_type]
                stream, residual, _, routed = layer(stream, residual, rotation, shown, recorder)
                if routed is not None:
                    raise NotRecordable("a router's logits")
        assert residual is not None
        self.stream: Stream = stream, residual

    def fits(
        self,
        body: Any,
        layers: list[Any],
        hidden: Tensor,
        rotations: Mapping[str, Rotation],
        mask: Mask,
        cache: DynamicCache,
    ) -> bool:
        """Whether everything is as it was when this was recorded."""
        if (
            hidden.shape != self.hidden.shape
            or hidden.dtype != self.hidden.dtype
            or body._kernel_policy is not self.policy
            or torch.get_num_threads() != self.threads
            or being_read() is not self.int8
            or len(layers) != len(self.layers)
            or any(now is not then for now, then in zip(layers, self.layers, strict=True))
        ):
            return False
        for name, rotation in self.rotations.items():
            if rotations[name].cos.shape != rotation.cos.shape:
                return False
        for i, (keys, values) in enumerate(self.buffers):
            now = cache.buffers(i)
            if now[0] is not keys or now[1] is not values:
                return False
        for held, name, module in self.modules:
            if held.get(name) is not module or _does_more(module):
                return False
        for held, name, parameter, at in self.parameters:
            if held.get(name) is not parameter or parameter.data_ptr() != at:
                return False
        shapes = tuple(b.shape for b in _bounds(mask, hidden, cache))
        return shapes == tuple(b.shape for b in self.bounds)

    def run(
        self, hidden: Tensor, rotations: Mapping[str, Rotation], mask: Mask, cache: DynamicCache
    ) -> Stream:
        """The stream, valid until the next run."""
        self.hidden.copy_(hidden)
        for name, rotation in self.rotations.items():
            rotation.cos.copy_(rotations[name].cos)
            rotation.sin.copy_(rotations[name].sin)
        for mine, theirs in zip(self.bounds, _bounds(mask, hidden, cache), strict=True):
            mine.copy_(theirs)
        self.position[0] = cache.get_seq_length()
        self.program.run()
        cache.lengthen(len(self.layers), hidden.shape[1])
        return self.stream


def _bounds(mask: Mask, hidden: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    T = hidden.shape[1]
    return mask.bounds_int32(T, cache.get_seq_length() + T, hidden.device)


def _does_more(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward in eval mode."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or module.training or "forward" in module.__dict__


def _children(layers: list[Any]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Every module in the layers, with the dict that holds it; hooks on any cannot be recorded."""
    found: list[tuple[dict[str, Any], str, nn.Module]] = [
        ({"": layer}, "", layer) for layer in layers
    ]
    for layer in layers:
        for module in layer.modules():
            found += [(module._modules, name, child) for name, child in module.named_children()]
    for _, _, module in found:
        if _does_more(module):
            raise NotRecordable(f"{type(module).__name__} does more than in inference")
    return found


def _parameters(layers: list[Any]) -> list[tuple[dict[str, Any], str, nn.Parameter, int]]:
    """Every parameter in the layers, with the dict that holds it and where its numbers are."""
    return [
        (module._parameters, name, parameter, parameter.data_ptr())
        for layer in layers
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
