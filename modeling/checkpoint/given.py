"""A state_dict in place of files: the same matching, ties, casts, checks and report."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swathe.modeling.checkpoint.header import TensorInfo
from swathe.modeling.checkpoint.reader import Checkpoint

_PLACE = Path("state_dict")  # what errors call it, where they would name a file


@dataclass(frozen=True)
class GivenTensors(Checkpoint):
    """A checkpoint of the tensors of a state_dict; the model gets copies of them."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor] | None) -> GivenTensors:
        """Raises TypeError for what is no mapping of names to tensors with values."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict is a {type(state_dict).__name__}; it must map names to tensors, as "
                "model.state_dict() does"
            )
        for name, value in state_dict.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_meta:
                raise TypeError(
                    f"state_dict[{name!r}] is a {type(value).__name__}; it must be a tensor with "
                    "values (not on the meta device) under a name"
                )
        tensors = {
            name: TensorInfo(name, _PLACE, t.dtype, tuple(t.shape), t.nbytes, i)
            for i, (name, t) in enumerate(state_dict.items())
        }
        return cls(_PLACE, types.MappingProxyType(tensors), {}, {}, dict(state_dict))

    def read(self, name: str, room: Tensor | None = None) -> Tensor:
        """A copy of the tensor `name`, in its dtype and on its device; `room` is not used."""
        return self.values[name].detach().clone(memory_format=torch.contiguous_format)
