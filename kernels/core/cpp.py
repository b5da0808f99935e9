"""The C++ library of csrc/: found, loaded with ctypes, its ABI version checked, its types declared.

The library is compiled with OpenMP and linked to no OpenMP runtime: loading it after torch binds
its symbols to the runtime that torch brought along, so there is one pool of threads.

The environment variable SWATHE_CSRC names another library file than the installation's, such as one
built with sanitizers; it is read once, and a file that does not serve is an error for every call.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int32
from functools import cache, lru_cache
from pathlib import Path

import torch

from swathe.kernels.core.errors import BackendUnavailable

ABI_VERSION = 8  # csrc/abi.h: SWATHE_ABI_VERSION
ISAS = ("portable", "avx2", "avx512")
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_TENSOR = 3
OVERRIDE = "SWATHE_CSRC"  # the environment variable
_REBUILD = "run `pip install -e .` (or `pip install .`) again where a C++ compiler is installed"

# entry points; each op takes one pointer to its packed arguments
_SIGNATURES = {
    "swathe_abi_version": [],
    "swathe_isa": [],
    "swathe_use_isa": [c_int32],
    "swathe_threaded": [],
    "swathe_math": [c_char_p],
    "swathe_cross_entropy_forward": [c_char_p],
    "swathe_cross_entropy_backward": [c_char_p],
    "swathe_gated_mlp_act_forward": [c_char_p],
    "swathe_gated_mlp_act_backward": [c_char_p],
    "swathe_layer_norm_forward": [c_char_p],
    "swathe_layer_norm_backward": [c_char_p],
    "swathe_qk_norm_rotary_forward": [c_char_p],
    "swathe_qk_norm_rotary_backward": [c_char_p],
    "swathe_rms_norm_forward": [c_char_p],
    "swathe_rms_norm_backward": [c_char_p],
    "swathe_run": [c_char_p],
    "swathe_append": [c_char_p],
    "swathe_rotary": [c_char_p],
    "swathe_linear": [c_char_p],
    "swathe_attention_forward": [c_char_p],
    "swathe_attention_decode": [c_char_p],
    "swathe_attention_backward": [c_char_p],
    "swathe_attention_backward_bias": [c_char_p],
}


def library_path() -> Path | None:
    """Where the compiled library lies: at SWATHE_CSRC if that is set, else in this installation.

    None where nothing was compiled; BackendUnavailable where SWATHE_CSRC names no file.
    """
    if asked := os.environ.get(OVERRIDE):
        if not Path(asked).is_file():
            raise BackendUnavailable(
                f"{OVERRIDE} is set to {asked!r}, where there is no file: give the path of a "
                "library built from csrc/, or unset it to use the installed one"
            )
        return Path(asked)
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    package = Path(__file__).parents[2]
    # the second place is that of a checkout whose links could not be made
    for folder in (package, package / "swathe"):
        path = folder / f"_csrc{suffix}"
        if path.is_file():
            return path
    return None


def load(path: Path) -> ctypes.CDLL:
    """Load and check a library; BackendUnavailable says what is wrong with it."""
    try:
        if _cut_short(path):
            raise OSError("the end of the file is missing")
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path.name} cannot be loaded: {error}; {_REBUILD}") from error
    if not hasattr(loaded, "swathe_abi_version"):
        raise BackendUnavailable(f"{path.name} is no swathe library; {_REBUILD}")
    found = loaded.swathe_abi_version()
    if found != ABI_VERSION:
        raise BackendUnavailable(
            f"{path.name} has ABI version {found}, this swathe needs {ABI_VERSION}: "
            f"it was built from another version; {_REBUILD}"
        )
    for name, types in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise BackendUnavailable(f"{path.name} lacks {name}; {_REBUILD}")
        function.argtypes, function.restype = types, c_int32
    return loaded


def _cut_short(path: Path) -> bool:
    # an ELF file that ends before its last table, as a copy that was interrupted does: the linker
    # takes it, and the first page that is missing ends the process
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < sections + size * count


@lru_cache(maxsize=1)
def _state() -> tuple[ctypes.CDLL | None, str]:
    path = library_path()
    if path is None:
        return None, f"the C++ library was not compiled; {_REBUILD}"
    try:
        return load(path), ""
    except BackendUnavailable as error:
        if os.environ.get(OVERRIDE):
            raise  # a library asked for by name serves or raises, as a backend does
        return None, str(error)


def library() -> ctypes.CDLL:
    """The loaded library; raises BackendUnavailable with the reason where there is none."""
    loaded, reason = _state()
    if loaded is None:
        raise BackendUnavailable(reason)
    return loaded


@cache
def entry(name: str) -> Callable[[bytes], int]:
    """The entry point `name`, which takes packed arguments and returns 0, or what went wrong."""
    function: Callable[[bytes], int] = getattr(library(), name)
    return function


def address_of(name: str) -> int:
    """Where the entry point `name` is in memory."""
    return ctypes.cast(entry(name), ctypes.c_void_p).value or 0  # type: ignore[arg-type]


class _Here(threading.local):
    note: Callable[[str, bytes], None] | None = None


_here = _Here()


def call(name: str, packed: bytes) -> int:
    """Call an entry point; 0, or what went wrong. While `noting`, the call is noted instead."""
    if _here.note is None:
        return entry(name)(packed)
    _here.note(name, packed)
    return 0


def is_noting() -> bool:
    """Whether calls of this thread are noted instead of made."""
    return _here.note is not None


@contextmanager
def noting(note: Callable[[str, bytes], None]) -> Iterator[None]:
    """Give every call of this thread to `note` instead of making it; core/program.py."""
    _here.note = note
    try:
        yield
    finally:
        _here.note = None


def why_unavailable() -> str | None:
    """Why backend "cpp" cannot be used in this installation, or None."""
    return _state()[1] or None


def isa() -> str:
    """The instruction set that the library uses here: "avx512", "avx2" or "portable"."""
    return ISAS[library().swathe_isa()]


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Use a narrower instruction set than the widest that there is, in every thread; for tests."""
    library().swathe_use_isa(ISAS.index(name))
    try:
        yield
    finally:
        library().swathe_use_isa(-1)
