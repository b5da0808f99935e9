"""Tensors to safetensors files: names to shards, a shard to bytes on the disk."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from swathe.modeling.checkpoint.header import DTYPES
from swathe.modeling.checkpoint.transforms import Joined

Storable = Tensor | Joined
Shard = dict[str, Storable]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(size: int | str) -> int:
    """Bytes in `5_000_000`, "5GB" (decimal) or "5GiB" (binary). Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(size))
    if isinstance(size, str) and found and found[2].upper() in _UNITS:
        value = int(float(found[1]) * _UNITS[found[2].upper()])
    else:
        value = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if value <= 0:
        raise ValueError(
            f"max_shard_size is {size!r}; give a positive number of bytes or a string such as "
            "'5GB' or '500MiB'"
        )
    return value


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what a safetensors file cannot hold faithfully. Raises ValueError, naming the key."""
    if not tensors:
        raise ValueError("tensors is empty; there is nothing to save")
    spans: list[tuple[torch.device, int, int, str]] = []
    for name, tensor in tensors.items():
        if not name or name == "__metadata__":
            raise ValueError(f"{name!r} cannot name a tensor in a safetensors file; rename it")
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values; load it first")
        if tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
            raise ValueError(
                f"{name!r} is {tensor.layout} {tensor.dtype}; a safetensors file holds dense "
                f"tensors of {', '.join(_NAMES.values())}: convert it first"
            )
        if tensor.numel():
            steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans.append((tensor.device, begin, begin + (steps + 1) * tensor.itemsize, name))
    spans.sort(key=lambda span: (str(span[0]), span[1], span[2]))
    for one, other in pairwise(spans):
        if one[0] == other[0] and other[1] < one[2]:
            raise ValueError(
                f"{one[3]!r} and {other[3]!r} share memory, which a file cannot record; leave the "
                "tied one out, or .clone() it"
            )


def split_into_shards(tensors: Mapping[str, Storable], limit: int) -> list[Shard]:
    """Consecutive groups of at most `limit` bytes; a larger tensor gets a shard to itself."""
    shards: list[Shard] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def header_bytes(tensors: Mapping[str, Storable]) -> bytes:
    """Length and JSON of a safetensors header for `tensors` laid out in their order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def create(path: Path) -> BinaryIO:
    """A new file with the rights that the umask leaves; FileExistsError if the name is taken."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_safetensors(path: Path, tensors: Mapping[str, Storable]) -> None:
    """Create `path` holding `tensors`, on the disk when this returns; one tensor is copied at most.

    Wide dtypes come first, so that every tensor starts at a multiple of its element size.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    with create(path) as file:
        file.write(header_bytes(ordered))
        for tensor in ordered.values():
            whole = tensor.assemble() if isinstance(tensor, Joined) else tensor
            source = whole.detach().to("cpu").resolve_conj().contiguous()
            if source.nbytes:
                data = (ctypes.c_ubyte * source.nbytes).from_address(source.data_ptr())
                file.write(memoryview(data).cast("B"))
        file.flush()
        os.fsync(file.fileno())
