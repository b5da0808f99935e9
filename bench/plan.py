"""What bench.gpu does, as lists of units: the most telling first, since time may run out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cases import GPU_SHAPES, NAMED, TINY_SHAPES
from bench.parity import HUGE, HUGE_BYTES
from swathe.kernels.norm.api import CASTINGS
from swathe.kernels.norm.shapes import GPU, Shape

Unit = dict[str, Any]
PARTS = ("parity", "bench", "host")

# rows of one tile in both directions, of several tiles backward, of several in both
_PROBES = {"rows": (3, 1024), "wide backward": (3, 10_000), "wide": (3, 33_001)}
_SECOND_LOOK = ("llama_8b_train", "llama_1b_train", "llama_8b", "llama_8b_batch", "llama_8b_decode")
_HOST = ("llama_8b_decode", "smollm2_135m_decode")


def probes(backend: str, device: str) -> list[Unit]:
    """Each kernel once, on a few rows."""
    return [
        {
            "kind": "probe",
            "name": f"probe {name}{' with residual' * residual}",
            "probe": name,
            "M": rows,
            "N": columns,
            "residual": residual,
            "backend": backend,
            "device": device,
            "limit_s": 90,
        }
        for name, (rows, columns) in _PROBES.items()
        for residual in (False, True)
    ]


def parity_lanes(backend: str, device: str, dry: bool) -> list[list[Unit]]:
    """The contract, one lane for each dtype."""
    # eager rounds where the fused backends do not, so it reaches the bounds in fp32 alone
    tried = ("float32",) if backend == "eager" else ("bfloat16",)
    dtypes = tried if dry else ("bfloat16", "float16", "float32")
    sets = ["edges"] if dry else ["edges", [s.name for s in GPU]]
    castings = CASTINGS[-1:] if dry else CASTINGS
    return [
        [
            {
                "kind": "parity",
                "dtype": dtype,
                "casting": casting,
                "shapes": shapes,
                "backend": backend,
                "device": device,
                "limit_s": 150,
            }
            for shapes in sets
            for casting in castings
        ]
        for dtype in dtypes
    ]


def checks(backend: str, device: str, dry: bool) -> list[Unit]:
    """What the contract does not see: reruns, graphs, streams, layouts, huge tensors."""
    tile, wide = (Shape("tile", 300, 4096), Shape("wide", 70, 40_000))
    shapes = TINY_SHAPES[:1] if dry else (tile, wide)
    rows, columns = (64, 32) if dry else HUGE
    plan: list[tuple[str, str, bool, dict[str, Any]]] = []
    for shape in shapes:
        each = {"shape": list(shape)}
        plan += [
            (f"100 reruns, {shape.name}", "reruns", False, {**each, "times": 4 if dry else 100}),
            (f"CUDA graph, {shape.name}", "graph_replay", True, each),
            (f"side stream, {shape.name}", "other_stream", True, each),
            (f"rows apart, {shape.name}", "layouts", False, each),
        ]
    plan += [
        ("torch.compile", "compiled", True, {"shape": list(shapes[0])}),
        ("past 2^31 elements", "huge", False, {"rows": rows, "columns": columns}),
    ]
    return [
        {
            "kind": "check",
            "name": name,
            "function": function,
            "gpu_only": gpu_only,
            "arguments": arguments,
            "bytes": HUGE_BYTES if function == "huge" else 0,
            "backend": backend,
            "device": device,
            "limit_s": 90,
        }
        for name, function, gpu_only, arguments in plan
    ]


def probed_by(columns: int) -> str:
    """Which probe runs the kernels that rows of this length take."""
    return "rows" if columns <= 8192 else "wide backward" if columns <= 16_384 else "wide"


def benchmarks(backend: str, device: str, dry: bool, broken: Sequence[str]) -> list[Unit]:
    """bf16 over every shape, then fp32 and fp16 over a few.

    Where a probe in `broken` failed, the peers are measured without the backend: a kernel that
    hangs would cost each of its cells the whole limit.
    """
    if dry:
        chosen = [(shape.name, "bfloat16") for shape in TINY_SHAPES]
    else:
        chosen = [(shape.name, "bfloat16") for shape in GPU_SHAPES]
        chosen += [(name, dtype) for dtype in ("float32", "float16") for name in _SECOND_LOOK]
    return [
        {
            "kind": "bench",
            "shape": shape,
            "dtype": dtype,
            "rounds": 3 if dry else None,
            "compiled": not dry,
            "without": [backend] * (probed_by(NAMED[shape].N) in broken),
            "device": device,
            "limit_s": 120,
        }
        for shape, dtype in chosen
    ]


def host_costs(backend: str, device: str, dry: bool) -> list[Unit]:
    """Python's share of a call."""
    shapes = (TINY_SHAPES[0].name,) if dry else _HOST
    facts = {"kind": "host", "backend": backend, "device": device, "limit_s": 60}
    return [{**facts, "shape": shape} for shape in shapes]
