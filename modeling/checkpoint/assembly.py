"""Loading through transforms: what a file should hold, and where each tensor read from it goes.

Matching sees the file's side only (names, shapes, dtypes of stored tensors), so that its errors
speak of what is in the file. A parameter made of several stored tensors is allocated when the first
of them is read, and each is copied to its place and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.checkpoint.header import TensorInfo
from swathe.modeling.checkpoint.matching import Match
from swathe.modeling.checkpoint.transforms import Group, WeightTransform, find_groups

Where = Callable[[str], torch.device | str]  # the device of a parameter, by its name


class Assembly:
    """One load of the entries `wanted` of a model from a file with the names `stored`.

    The attribute `wanted` is what the file should hold: {stored name: a tensor of its shape and
    dtype, without memory}. `parameters` is what `place` has filled: {name in the model: value}.
    """

    def __init__(
        self,
        wanted: Mapping[str, Tensor],
        stored: Collection[str],
        transforms: Sequence[WeightTransform],
        prefix: str,
    ) -> None:
        dotted = f"{prefix}." if prefix else ""
        plain = {name.removeprefix(dotted) for name in stored} if transforms else set()
        groups = find_groups(wanted, transforms, lambda n: n.removeprefix(dotted) in plain)
        self.wanted: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self._by_parameter = groups
        self._by_stored = {key: group for group in groups.values() for key in group.stored}
        self._shapes = {name: wanted[name].shape for name in groups}
        self._views: dict[str, Tensor] = {}
        for name, tensor in wanted.items():
            group = groups.get(name)
            if group is None:
                self._want(name, tensor)
            elif name == group.parameters[0]:
                outlines = [torch.empty_like(wanted[p], device="meta") for p in group.parameters]
                parts = group.transform.to_stored(outlines)
                for key, part in zip(group.stored, parts, strict=True):
                    self._want(key, part)

    def _want(self, key: str, tensor: Tensor) -> None:
        if key in self.wanted:
            raise ValueError(f"two parameters would be loaded from {key!r}; correct the transforms")
        self.wanted[key] = tensor

    def stored_name(self, parameter: str) -> str:
        """What a file calls a parameter; its own name where it is more than a renamed tensor."""
        group = self._by_parameter.get(parameter)
        return group.stored[0] if group and group.transform.renames_only else parameter

    def model_names(self, key: str) -> tuple[str, ...]:
        """The parameters that stored tensor `key` is, or is part of."""
        group = self._by_stored.get(key)
        return group.parameters if group else (key,)

    def settle(self, result: Match, dtype: torch.dtype | None) -> None:
        """Leave out of the plan what cannot be assembled whole; report what can.

        Raises CheckpointError (E_DTYPE) where the parts of one parameter differ in dtype and
        `dtype`, to which all would be cast, is None.
        """
        for group in dict.fromkeys(self._by_stored.values()):
            found = {key: result.plan[key] for key in group.stored if key in result.plan}
            if len(found) < len(group.stored):
                for key, info in found.items():
                    del result.plan[key]
                    result.report.unexpected.append(info.name)
                continue
            if dtype is None:
                _require_one_dtype(group, list(found.values()))
            for parameter in group.parameters:
                result.report.converted[parameter] = [info.name for info in found.values()]

    def place(self, key: str, value: Tensor, device: Where) -> None:
        """Put stored tensor `key`, already in its final dtype, where it belongs."""
        group, first = self._by_stored.get(key), self.model_names(key)[0]
        if group is None or group.transform.renames_only:
            self.parameters[first] = value.to(device(first))
        elif len(group.parameters) > 1:
            parts = group.transform.to_parameters(value)
            for parameter, part in zip(group.parameters, parts, strict=True):
                self.parameters[parameter] = self._allocate(parameter, value, device).copy_(part)
        else:
            if key not in self._views:
                self.parameters[first] = whole = self._allocate(first, value, device)
                self._views |= zip(group.stored, group.transform.to_stored([whole]), strict=True)
            self._views[key].copy_(value)

    def _allocate(self, parameter: str, like: Tensor, device: Where) -> Tensor:
        shape = self._shapes[parameter]
        return torch.empty(shape, dtype=like.dtype, device=device(parameter))


def _require_one_dtype(group: Group, infos: Sequence[TensorInfo]) -> None:
    odd = next((info for info in infos if info.dtype != infos[0].dtype), None)
    if odd is not None:
        was, rest = (str(info.dtype).removeprefix("torch.") for info in (odd, infos[0]))
        raise CheckpointError(
            "E_DTYPE",
            f"{odd.file}: {odd.name!r} is {was}, but {infos[0].name!r} of the same parameter "
            f"{group.parameters[0]!r} is {rest}; load with a dtype, to which all are cast",
            file=odd.file,
            key=odd.name,
        )
