"""The capability records that every op's own backends share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from importlib import import_module
from typing import Any

from swathe.kernels.core.cpp import why_unavailable
from swathe.kernels.core.device import interpreting
from swathe.kernels.core.launch import why_no_triton
from swathe.kernels.core.registry import Backend
from swathe.kernels.core.spec import FLOATS, FLOATS_AND_DOUBLE, Capabilities

Features = Mapping[str, frozenset[Hashable] | str]


def eager_backend(op: str, function: str, features: Features) -> Backend:
    """The definition: plain PyTorch, on any device, in fp64 too. `function` is "module.name"."""
    module, _, name = function.rpartition(".")
    return Backend(
        op,
        "eager",
        load=lambda: getattr(import_module(module), name),
        capabilities=Capabilities(
            devices=frozenset({"cpu", "cuda", "meta"}),
            dtypes=FLOATS_AND_DOUBLE,
            features=features,
        ),
    )


def cpp_backend(op: str, load: Callable[[], Callable[..., Any]], features: Features) -> Backend:
    """The C++ library of csrc/, for CPUs; `missing` says why an installation lacks it."""
    return Backend(
        op,
        "cpp",
        load=load,
        capabilities=Capabilities(
            devices=frozenset({"cpu"}), dtypes=FLOATS, features=features, graph_capture=False
        ),
        missing=why_unavailable,
    )


def triton_backend(
    op: str,
    load: Callable[[], Callable[..., Any]],
    features: Features,
    *,
    max_size: int | None = None,
) -> Backend:
    """Triton kernels: GPUs from sm_80 on; a CPU only where Triton interprets."""
    return Backend(
        op,
        "triton",
        load=load,
        capabilities=Capabilities(
            devices=frozenset({"cuda", "cpu"} if interpreting() else {"cuda"}),
            dtypes=FLOATS,
            features=features,
            min_arch=80,
            max_size=max_size,
        ),
        missing=why_no_triton,
    )
