"""What bench.gpu does for one op, as lists of units: the most telling first; time may run out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.parity import CHECKS, HUGE_BYTES, NEED_A_GPU, groups
from bench.subject import Subject

Unit = dict[str, Any]
PARTS = ("parity", "bench", "host", "models")


def probes(of: Subject, backend: str, device: str) -> list[Unit]:
    """Each kernel once, on small inputs."""
    facts = {"kind": "probe", "op": of.op, "backend": backend, "device": device, "limit_s": 90}
    return [
        {**facts, "name": f"probe {name} {form}".strip(), "probe": name, "form": form}
        for name in of.probes
        for form in of.forms
    ]


def parity_lanes(of: Subject, backend: str, device: str, dry: bool) -> list[list[Unit]]:
    """The contract, one lane for each dtype."""
    # eager rounds where the fused backends do not, so it reaches the bounds in fp32 alone
    tried = ("float32",) if backend == "eager" else ("bfloat16",)
    dtypes = tried if dry else ("bfloat16", "float16", "float32")
    facts = {"kind": "parity", "op": of.op, "backend": backend, "device": device, "limit_s": 150}
    chosen = groups(of.contract)[:1] if dry else groups(of.contract)
    sets: list[dict[str, Any]] = [{"shapes": "edges", "group": group} for group in chosen]
    if not dry:
        sets.append({"shapes": [shape.name for shape in of.large or of.gpu]})
    return [[{**facts, "dtype": dtype, **each} for each in sets] for dtype in dtypes]


def checks(of: Subject, backend: str, device: str, dry: bool) -> list[Unit]:
    """What the contract does not see: reruns, graphs, streams, layouts, huge tensors."""
    facts = {"kind": "check", "op": of.op, "backend": backend, "device": device, "dry": dry}
    shapes = list(of.tiny[:1]) if dry else [*of.checked.values()]
    found = [
        {**facts, "name": f"{name}, {shape.name}", "check": name, "shape": shape.name}
        for shape in shapes
        for name in CHECKS
    ]
    found += [{**facts, "name": name, "check": name} for name in of.more]
    if of.huge is not None:
        found.append({**facts, "name": "past 2^31 elements", "check": "huge"})
    return [{**unit, **_needs(unit["check"]), "limit_s": 90} for unit in found]


def _needs(check: str) -> dict[str, Any]:
    return {"gpu_only": check in NEED_A_GPU, "bytes": HUGE_BYTES if check == "huge" else 0}


def benchmarks(
    of: Subject, backend: str, device: str, dry: bool, broken: Sequence[str]
) -> list[Unit]:
    """bf16 over every shape, then fp32 and fp16 over a few.

    Where a probe in `broken` failed, the peers are measured without the backend: a kernel that
    hangs would cost each of its cells the whole limit.
    """
    if dry:
        chosen = [(shape, "bfloat16") for shape in of.tiny]
    else:
        chosen = [(shape, "bfloat16") for shape in of.gpu]
        second = [of.shape(name) for name in of.second_look]
        chosen += [(shape, dtype) for dtype in ("float32", "float16") for shape in second]
    return [
        {
            "kind": "bench",
            "op": of.op,
            "shape": shape.name,
            "dtype": dtype,
            "rounds": 3 if dry else None,
            "compiled": not dry,
            "without": [backend] * (of.probed(shape) in broken),
            "device": device,
            "limit_s": 180,
        }
        for shape, dtype in chosen
    ]


def host_costs(of: Subject, backend: str, device: str, dry: bool) -> list[Unit]:
    """Python's share of a call."""
    shapes = (of.tiny[0].name,) if dry else of.host
    facts = {"kind": "host", "op": of.op, "backend": backend, "device": device, "limit_s": 60}
    return [{**facts, "shape": shape, "rounds": 2 if dry else 15} for shape in shapes]


def whole_models(dry: bool) -> list[Unit]:
    """Tasks and models: what serves, then what trains, small models first of each family's."""
    if dry:
        sizes = {"decoding": {"length": 8, "new": 4}, "training": {"length": 8, "steps": 1}}
        names = ("llama_1b",)
    else:
        sizes = {"decoding": {"length": 512, "new": 128}, "training": {"length": 4096, "steps": 6}}
        names = ("llama_1b", "qwen3_0.6b", "gemma3_1b", "smollm2_135m", "qwen3_1.7b", "llama_8b")
        names += ("gemma_2b", "qwen3_8b")
    return [
        {"task": task, "model": name, "batch": 1, "dtype": "bfloat16", **size}
        for name in names
        for task, size in sizes.items()
    ]
