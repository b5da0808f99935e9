"""What this installation consists of and what each op runs on here, as plain facts.

`python -m swathe doctor` prints them. Nothing is compiled, launched or, but for torch, imported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from swathe.kernels.catalog import OPS
from swathe.kernels.core import cpp
from swathe.kernels.core.device import arch, interpreting
from swathe.kernels.core.errors import BackendUnavailable
from swathe.kernels.core.launch import why_no_triton
from swathe.kernels.core.registry import Backend, preference, registered
from swathe.kernels.core.spec import Spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = {"inference": False, "training": True}


def survey() -> dict[str, Any]:
    """All facts, ready for JSON; `problems` lists what does not work but should."""
    library, triton, gpus = library_facts(), triton_facts(), gpu_facts()
    problems = [library["problem"]] if library["problem"] else []
    if triton["problem"] and gpus:
        problems.append(f"GPUs are here, but {triton['problem']}")
    problems += [f"GPU {gpu['index']}: {gpu['problem']}" for gpu in gpus if gpu["problem"]]
    usable = [f"cuda:{gpu['index']}" for gpu in gpus if not gpu["problem"]]
    return {
        "versions": versions(("torch", "triton", "transformers")),
        "cpu": cpu_facts(),
        "gpus": gpus,
        "library": library,
        "triton": triton,
        "ops": {op: op_facts(op, ["cpu", *usable]) for op in sorted(OPS)},
        "problems": problems,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_facts() -> dict[str, Any]:
    """Name and cores, the threads that ops use, the widest vectors that torch finds."""
    return {
        "name": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "widest": torch.backends.cpu.get_cpu_capability(),
    }


def gpu_facts() -> list[dict[str, Any]]:
    """Name and architecture of every GPU that torch sees, or why it cannot be used."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts: dict[str, Any] = {"index": index, "name": None, "arch": None, "problem": None}
        try:
            properties = torch.cuda.get_device_properties(index)
            number = arch(torch.device("cuda", index))
            facts["name"] = properties.name
            facts["arch"] = f"sm_{number}" if number else properties.gcnArchName.partition(":")[0]
        # a driver that is too old, a device that somebody else holds
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            facts["problem"] = str(error).partition("\n")[0]
        found.append(facts)
    return found


def library_facts() -> dict[str, Any]:
    """The C++ library: where it is, or the problem with it, and how it was built."""
    facts: dict[str, Any] = dict.fromkeys(("path", "abi", "openmp", "isa", "problem"))
    try:
        facts["path"] = str(cpp.library_path() or "") or None
        loaded = cpp.library()
        facts["abi"] = loaded.swathe_abi_version()
        facts["openmp"] = loaded.swathe_threaded() == 1
        facts["isa"] = cpp.isa()
    except BackendUnavailable as error:
        facts["problem"] = str(error)
    return facts


def triton_facts() -> dict[str, Any]:
    """Triton: whether it is installed, interprets or compiles, and where it keeps what it made."""
    home = Path(os.environ.get("TRITON_HOME", str(Path.home())), ".triton", "cache")
    return {
        "problem": why_no_triton(),
        "interpreting": interpreting(),
        "cache": os.environ.get("TRITON_CACHE_DIR", str(home)),
    }


def a_layers_call(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """Size and features of the call that a decoder's or an encoder's layer makes to `op`."""
    calls: dict[str, dict[str, Any]] = {
        "attention": {"size": 64, "grouped": True},
        "cross_entropy": {"size": 32_000},
        "gated_mlp_act": {"size": 2048, "act": "silu", "casting": "fp32"},
        "layer_norm": {"size": 2048, "weight_dtype": dtype},
        "linear": {"size": 2048},
        "linear_cross_entropy": {"size": 32_000},
        "qk_norm_rotary": {"size": 64, "weight_dtype": dtype, "table_dtype": dtype},
        "rms_norm": {"size": 2048, "weight_dtype": dtype, "casting": "llama"},
        "rotary": {"size": 64, "table_dtype": dtype},
    }
    return calls[op]


def op_facts(op: str, devices: Sequence[str]) -> dict[str, Any]:
    """For each backend "ok" or why it serves no such call; for each device what "auto" takes.

    `auto` is by device, type and mode: {"cpu": {"fp32": {"inference": "cpp", ...}}}, with None
    where "auto" raises.
    """
    import_module(OPS[op])
    status: dict[str, str] = {}
    auto: dict[str, dict[str, dict[str, str | None]]] = {}
    for device, dtype, mode in product(devices, DTYPES, MODES):
        call = a_layers_call(op, DTYPES[dtype])
        where = torch.device(device)
        spec = Spec.on(op, where, DTYPES[dtype], grad=MODES[mode], **call)
        auto.setdefault(device, {}).setdefault(dtype, {})[mode] = _auto(spec)
        for backend in registered(op).values():
            reasons = _reasons(backend, spec)
            if not reasons:
                status[backend.name] = "ok"
            status.setdefault(backend.name, ", ".join(reasons))
    return {"backends": status, "auto": auto}


def _auto(spec: Spec) -> str | None:
    known = registered(spec.op)
    try:
        return next((name for name in preference(spec) if not known[name].check(spec)), None)
    except BackendUnavailable:
        return None


def _reasons(backend: Backend, spec: Spec) -> list[str]:
    try:
        # what is not installed need not be said to lack features too
        absent = backend.missing()
        return [absent] if absent else backend.check(spec)
    # a library that SWATHE_CSRC names and that cannot be used
    except BackendUnavailable as error:
        return [str(error)]
