"""Reading a checkpoint directory: validate everything, then stream tensors into a model.

All structure is checked before a tensor is read, and names, shapes and dtypes of all tensors
before one is assigned, so a refused checkpoint leaves the model as it was. Tensors are read into
memory of their own: a file that changes afterwards cannot change or kill the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swathe.modeling.checkpoint.assembly import Assembly, Where
from swathe.modeling.checkpoint.errors import CheckpointError, CheckpointNotFound
from swathe.modeling.checkpoint.files import Identity, open_regular
from swathe.modeling.checkpoint.header import TensorInfo
from swathe.modeling.checkpoint.layout import read_layout
from swathe.modeling.checkpoint.matching import Match, Strict, match
from swathe.modeling.checkpoint.progress import Progress
from swathe.modeling.checkpoint.report import LoadReport
from swathe.modeling.checkpoint.transforms import WeightTransform

_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint directory: what it holds (`tensors`), read on demand (`read`)."""

    directory: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    identities: Mapping[Path, Identity]

    @classmethod
    def open(cls, directory: str | Path, variant: str | None = None) -> Checkpoint:
        """Find and validate the weight files of `directory` without reading a tensor.

        `variant` is part of their names, as in model.fp16.safetensors (names.py).
        Raises CheckpointError with a code (E_PATH, E_SAFETENSORS, E_INDEX, E_MISSING_SHARD, ...)
        and the file at fault; CheckpointNotFound, also a FileNotFoundError, where nothing is there.
        """
        directory = Path(directory)
        if not directory.exists():
            raise CheckpointNotFound(
                "E_MISSING_FILE",
                f"{directory}: no such directory; give the directory that holds config.json and "
                "model.safetensors",
                file=directory,
            )
        if not directory.is_dir():
            raise CheckpointError(
                "E_NOTDIR",
                f"{directory}: is a file; give the directory that holds it",
                file=directory,
            )
        headers, metadata = read_layout(directory, variant)
        tensors = {name: info for header in headers for name, info in header.tensors.items()}
        if not tensors:
            raise CheckpointError(
                "E_EMPTY",
                f"{headers[0].file}: holds no tensors; save the checkpoint again",
                file=headers[0].file,
            )
        return cls(
            directory,
            types.MappingProxyType(tensors),
            types.MappingProxyType(metadata or dict(headers[0].metadata)),
            {header.file: header.identity for header in headers},
        )

    def renamed(self, mapping: Mapping[str, str] | None) -> Mapping[str, TensorInfo]:
        """`tensors` under other names: of each pattern in turn, the first match is replaced.

            checkpoint.renamed({r"^transformer\\.h\\.": "model.layers."})

        Raises CheckpointError (E_DUPKEY) where two names become one, ValueError for a pattern that
        is no regular expression.
        """
        if not mapping:
            return self.tensors
        tensors: dict[str, TensorInfo] = {}
        for stored, info in self.tensors.items():
            name = stored
            for pattern, new in mapping.items():
                try:
                    name = re.sub(pattern, new, name, count=1)
                except (re.error, IndexError) as error:
                    raise ValueError(
                        f"key_mapping: {pattern!r}: {new!r} is no pattern and what replaces it "
                        f"({error}); write it as for re.sub"
                    ) from None
            if name in tensors:
                raise CheckpointError(
                    "E_DUPKEY",
                    f"{info.file}: key_mapping gives {tensors[name].name!r} and {stored!r} the "
                    f"same name {name!r}; make its patterns narrower",
                    file=info.file,
                    key=stored,
                )
            tensors[name] = info
        return tensors

    def read(self, name: str, room: Tensor | None = None) -> Tensor:
        """The tensor `name` in its stored dtype, on the CPU, in memory of its own.

        With `room`, bytes to read into, it is a view of those, until the next one is read there.
        Raises KeyError for a name that is not in `tensors`, CheckpointError (E_CHANGED) when the
        file is no longer the one that was validated.
        """
        info = self.tensors[name]
        if room is None:  # a device is named for the case of a meta context
            tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        else:
            tensor = room[: info.nbytes].view(info.dtype).view(info.shape)
        with open_regular(Path(os.path.realpath(info.file))) as file:
            if Identity.of(os.fstat(file.fileno())) != self.identities[info.file]:
                self._changed(info)
            if info.nbytes:
                target = (ctypes.c_ubyte * info.nbytes).from_address(tensor.data_ptr())
                view = memoryview(target).cast("B")
                file.seek(info.offset)
                filled = 0
                while filled < info.nbytes:
                    got = file.readinto(view[filled:])
                    if not got:
                        self._changed(info)
                    filled += got
        return tensor

    def _changed(self, info: TensorInfo) -> None:
        raise CheckpointError(
            "E_CHANGED",
            f"{info.file}: changed while {info.name!r} was read; wait until whoever writes it is "
            "done and load again",
            file=info.file,
            key=info.name,
        )


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | Callable[[str], torch.device],
    tied: Mapping[str, str],
    prefix: str,
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    strict: Strict = "head",
    ignore_mismatched_sizes: bool = False,
    check_finite: bool = True,
    progress: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    transforms: Sequence[WeightTransform] = (),
    in_fp32: Callable[[str], bool] = lambda name: False,
) -> LoadReport:
    """Give `model`, built on the meta device, the tensors of `checkpoint`.

    `dtype` None keeps each stored dtype. `tied` maps a tied parameter to its source: both become
    one Parameter. `prefix` is the body's attribute name; one `prefix.` is added or removed where
    the checkpoint was saved from a model with or without a head. The model's `_key_renames` and
    `_head_parts`, and `strict`, are those of `match`: missing head parameters stay as they are.
    `key_mapping` renames stored tensors first, as Checkpoint.renamed. `transforms` say how stored
    tensors make up parameters; errors and patterns to ignore name the stored ones. `in_fp32` tells
    parameters that are float32 whatever `dtype` is. `device` may be a function of a parameter's
    name. Peak memory is the model and one stored tensor. Raises CheckpointError (E_KEYS, E_SHAPE,
    E_DTYPE, E_TIED, E_NONFINITE, E_OVERFLOW) with the model untouched.
    """
    _check_options(dtype, strict)
    stored = checkpoint.renamed(key_mapping)
    assembly = Assembly(model.state_dict(keep_vars=True), stored, transforms, prefix)
    result = match(
        assembly.wanted,
        stored,
        directory=checkpoint.directory,
        tied={assembly.stored_name(a): assembly.stored_name(b) for a, b in tied.items()},
        prefix=prefix,
        renames=getattr(model, "_key_renames", {}),
        head_parts=getattr(model, "_head_parts", ()),
        ignore_missing=ignore_missing,
        ignore_unexpected=ignore_unexpected,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    _require_equal_ties(checkpoint, result)
    known = result.report.tied  # so far by stored names
    result.report.tied = {a: b for a, b in tied.items() if assembly.stored_name(a) in known}
    assembly.settle(result, dtype)
    total = sum(info.nbytes for info in result.plan.values())
    with Progress("loading", total, enabled=progress) as bar:
        where = device if callable(device) else lambda name: device
        _read_all(checkpoint, result, assembly, dtype, in_fp32, where, check_finite, bar)
    for name, value in assembly.parameters.items():
        _assign(model, name, value)
    for name, source in result.report.tied.items():
        _share(model, name, source)
    result.report.loaded = len(assembly.parameters)
    return result.report


def _check_options(dtype: torch.dtype | None, strict: object) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"dtype is {dtype}; weights load as a floating dtype, or None to keep theirs"
        )
    if strict not in ("head", True, False):
        raise ValueError(f"strict is {strict!r}; allowed are 'head', True and False")


def _require_equal_ties(checkpoint: Checkpoint, result: Match) -> None:
    """A checkpoint may store both ends of a tie, but only with the same bits."""
    for name, info in result.both_tied.items():
        source = result.plan.get(result.report.tied[name])
        if source is None:
            continue
        one, other = checkpoint.read(info.name), checkpoint.read(source.name)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise CheckpointError(
                "E_TIED",
                f"{info.file}: {info.name!r} and {source.name!r} differ, but the config ties them "
                "to one parameter; set tie_word_embeddings to false in config.json, or pass "
                "tie_word_embeddings=False, to keep both",
                file=info.file,
                key=info.name,
            )


def _read_all(
    checkpoint: Checkpoint,
    result: Match,
    assembly: Assembly,
    dtype: torch.dtype | None,
    in_fp32: Callable[[str], bool],
    device: Where,
    check_finite: bool,
    bar: Progress,
) -> None:
    """Read what is planned in the order of the files, each tensor straight to its place."""
    plan = sorted(result.plan.items(), key=lambda item: (str(item[1].file), item[1].offset))
    targets = {key: _target(assembly, key, info.dtype, dtype, in_fp32) for key, info in plan}
    # tensors that are cast pass through one room: freed one by one, they would leave holes in the
    # heap, which malloc keeps from the system
    room = max((info.nbytes for key, info in plan if targets[key] != info.dtype), default=0)
    passage = torch.empty(room, dtype=torch.uint8, device="cpu")
    for key, info in plan:
        target = targets[key]
        if target != info.dtype:
            kinds = (info.dtype, target)
            result.report.cast.update(dict.fromkeys(assembly.model_names(key), kinds))
        assembly.place(key, _read_as(checkpoint, info, target, passage, check_finite), device)
        bar.advance(info.nbytes)


def _target(
    assembly: Assembly,
    key: str,
    stored: torch.dtype,
    dtype: torch.dtype | None,
    in_fp32: Callable[[str], bool],
) -> torch.dtype:
    """The dtype that stored tensor `key` is loaded in."""
    if not assembly.wanted[key].is_floating_point():
        return stored
    if any(in_fp32(name) for name in assembly.model_names(key)):
        return torch.float32
    return stored if dtype is None else dtype


def _read_as(
    checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype, passage: Tensor, check: bool
) -> Tensor:
    stored = checkpoint.read(info.name, None if dtype == info.dtype else passage)
    value = stored.to(dtype)
    if check:
        _require_finite(value, stored, info)
    return value


def _require_finite(value: Tensor, stored: Tensor, info: TensorInfo) -> None:
    if not value.is_floating_point() or not value.numel() or _is_finite(value):
        return
    if value.dtype != stored.dtype and _is_finite(stored):
        limit = torch.finfo(value.dtype).max
        raise CheckpointError(
            "E_OVERFLOW",
            f"{info.file}: {info.name!r} ({str(stored.dtype).removeprefix('torch.')}) has values "
            f"beyond {limit:g}, the largest {str(value.dtype).removeprefix('torch.')}; "
            "load it with dtype=torch.bfloat16 or torch.float32",
            file=info.file,
            key=info.name,
        )
    raise CheckpointError(
        "E_NONFINITE",
        f"{info.file}: {info.name!r} holds NaN or Inf, so the model would too; use an earlier "
        "checkpoint, or pass check_finite=False to look at this one",
        file=info.file,
        key=info.name,
    )


def _is_finite(value: Tensor) -> bool:
    value = value.detach()
    # a finite sum has no NaN and no infinity in it; it is several times quicker than extremes, but
    # makes a wider copy first, so it goes piece by piece
    wide = torch.promote_types(value.dtype, torch.float32)
    pieces = (value,) if wide == value.dtype else value.flatten().split(_PIECE)
    if all(bool(torch.isfinite(piece.sum(dtype=wide))) for piece in pieces):
        return True
    low, high = torch.aminmax(value)  # NaN goes through both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value


def _share(model: nn.Module, name: str, source: str) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)
