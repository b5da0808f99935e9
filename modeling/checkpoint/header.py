"""The header of one safetensors file, checked completely before a byte of data is touched.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}},
then the data. Tensors must tile the data exactly: no overlap, no hole, nothing after the last.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from swathe.modeling.checkpoint import json_object
from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.checkpoint.files import Identity, open_regular

HEADER_CAP = 100_000_000
MAX_NDIM = 32
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_OTHER_FORMATS = {
    b"PK\x03\x04": ("E_PICKLE", "is a PyTorch pickle archive, whatever its name says"),
    b"\x80": ("E_PICKLE", "is a Python pickle, whatever its name says"),
    b"GGUF": ("E_SAFETENSORS", "is a GGUF file"),
    b"version https://git-lfs": ("E_SAFETENSORS", "is a Git LFS pointer; run `git lfs pull`"),
    b"<!DOCTYPE": ("E_SAFETENSORS", "is a web page; the download failed"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` of `file`; shape in elements."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """One validated file: its tensors, its metadata, and which version of the file was checked."""

    file: Path
    identity: Identity
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(real: Path, shown: Path) -> Header:
    """Validate the file at resolved path `real`; errors call it `shown`.

    Raises CheckpointError E_SAFETENSORS (structure), E_DTYPE (unknown dtype), E_FORMAT (written
    for another framework) or E_PICKLE.
    """
    with open_regular(real) as file:
        identity = Identity.of(os.fstat(file.fileno()))
        start = file.read(32)
        _refuse_other_formats(start, shown)
        if identity.size < 8 or len(start) < 8:
            _refuse(shown, f"has {identity.size} bytes; the header length alone takes 8")
        length = int.from_bytes(start[:8], "little")
        if length > HEADER_CAP:
            _refuse(shown, f"claims a header of {length} bytes; at most {HEADER_CAP} are allowed")
        if length > identity.size - 8:
            _refuse(
                shown,
                f"claims a header of {length} bytes, but only {identity.size - 8} follow "
                "(truncated or corrupt)",
            )
        file.seek(8)
        text = bytearray()
        while len(text) < length:
            part = file.read(length - len(text))
            if not part:
                _refuse(shown, "ended while its header was read")
            text += part
    entries = json_object.parse(
        bytes(text),
        code="E_SAFETENSORS",
        file=shown,
        expected="a safetensors header {name: {dtype, shape, data_offsets}}",
    )
    metadata = _metadata(entries.pop("__metadata__", {}), shown)
    tensors = {name: _tensor(name, entry, shown, 8 + length) for name, entry in entries.items()}
    _check_tiling(tensors, shown, 8 + length, identity.size)
    return Header(shown, identity, tensors, metadata)


def _refuse(
    file: Path, reason: str, key: str | None = None, code: str = "E_SAFETENSORS"
) -> NoReturn:
    raise CheckpointError(
        code, f"{file}: {reason}; download or save this file again", file=file, key=key
    )


def _refuse_other_formats(start: bytes, file: Path) -> None:
    for magic, (code, what) in _OTHER_FORMATS.items():
        # a safetensors file whose header has 128 bytes also starts with \x80, but not its JSON
        if start.startswith(magic) and start[8:9] != b"{":
            raise CheckpointError(
                code,
                f"{file}: {what}. Only safetensors is read, because unpickling can run code; "
                "convert with safetensors.torch.save_file or transformers' save_pretrained",
                file=file,
            )


def _metadata(found: Any, file: Path) -> dict[str, str]:
    ok = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not ok:
        _refuse(file, "__metadata__ must map strings to strings", "__metadata__")
    framework = found.get("format", "pt")
    if framework != "pt":
        raise CheckpointError(
            "E_FORMAT",
            f"{file}: was written for format {framework!r}; only 'pt' (or none) has the layout "
            "of torch weights; convert it with the framework that wrote it",
            file=file,
            key="format",
        )
    return found


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"entry of {name!r} must hold exactly dtype, shape and data_offsets", name)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        _refuse(
            file,
            f"{name!r} has dtype {entry['dtype']!r}; allowed are {', '.join(DTYPES)}",
            name,
            "E_DTYPE",
        )
    dtype = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_index_list(shape) or len(shape) > MAX_NDIM:
        _refuse(
            file, f"{name!r} has shape {_short(shape)}; needs at most {MAX_NDIM} sizes >= 0", name
        )
    if not _is_index_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"{name!r} has data_offsets {_short(offsets)}; needs [begin, end]", name)
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        _refuse(file, f"{name!r} has shape {_short(shape)}: more bytes than can exist", name)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        _refuse(
            file,
            f"{name!r} with shape {shape} and dtype {entry['dtype']} takes {nbytes} bytes, but "
            f"data_offsets {offsets} give it {offsets[1] - offsets[0]}",
            name,
        )
    return TensorInfo(name, file, dtype, tuple(shape), nbytes, data_start + offsets[0])


def _is_index_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_tiling(tensors: Mapping[str, TensorInfo], file: Path, start: int, size: int) -> None:
    end = start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset < end:
            _refuse(file, f"{info.name!r} overlaps the tensor before it", info.name)
        if info.offset > end:
            _refuse(file, f"{info.offset - end} unused bytes lie before {info.name!r}", info.name)
        end += info.nbytes
        if end > size:
            _refuse(
                file,
                f"{info.name!r} ends at byte {end}, past the end of the file at {size} (truncated)",
                info.name,
            )
    if end != size:
        _refuse(file, f"{size - end} bytes follow the last tensor")
