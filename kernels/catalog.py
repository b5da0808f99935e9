"""Which ops exist, which backends they have here, and why a call would get one and not another."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from swathe.kernels.core.registry import preference, registered
from swathe.kernels.core.spec import Spec

OPS = {
    "attention": "swathe.kernels.attention.api",
    "cross_entropy": "swathe.kernels.cross_entropy.api",
    "linear": "swathe.kernels.linear.api",
    "linear_cross_entropy": "swathe.kernels.linear_cross_entropy.api",
    "qk_norm_rotary": "swathe.kernels.qk_norm_rotary.api",
    "gated_mlp_act": "swathe.kernels.gated_mlp_act.api",
    "layer_norm": "swathe.kernels.layer_norm.api",
    "rms_norm": "swathe.kernels.norm.api",
    "rotary": "swathe.kernels.rotary.api",
}


def backends(op: str | None = None) -> dict[str, dict[str, str]]:
    """For each op, its backends and whether this installation can run them ("ok" or why not)."""
    if op is not None and op not in OPS:
        raise ValueError(f"no op is called {op!r}; known: {sorted(OPS)}")
    chosen = [op] if op else sorted(OPS)
    for name in chosen:
        import_module(OPS[name])
    return {
        name: {b.name: b.missing() or "ok" for b in registered(name).values()} for name in chosen
    }


def explain(
    op: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    grad: bool = False,
    compiled: bool = False,
    **features: Any,
) -> str:
    """One line a backend: whether it would serve such a call, and which one "auto" takes.

    `size` is the op's own measure: row length of a norm, head size of attention.
    """
    backends(op)
    where = torch.device(device)
    spec = Spec.on(op, where, dtype, size=size, grad=grad, compiled=compiled, **features)
    known = registered(op)
    reasons = {name: backend.check(spec) for name, backend in known.items()}
    chosen = next((name for name in preference(spec) if not reasons[name]), None)
    lines = [f"{spec}"]
    for name in known:
        mark = "->" if name == chosen else "  "
        lines.append(f"{mark} {name:8} {', '.join(reasons[name]) or 'serves'}")
    return "\n".join(lines)
