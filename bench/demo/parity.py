"""Kernels on the activations and gradients of the model's layer 0, against fp64.

    gold   the eager formula in fp64 on the rounded inputs
    ideal  gold, rounded once
    eager  the eager layer in the model's dtype
    rms    root mean square of (output - gold)

Triton's kernels run compiled on a GPU. On a CPU they are interpreted, with hardware's numerics, by
the tests' interpreter, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swathe

ROOT = Path(__file__).resolve().parents[2]
Captured = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ParityRow:
    """One output of one kernel: rms errors, and how many elements differ from eager's."""

    case: str
    backend: str
    output: str
    dtype: str
    rms: float
    rms_eager: float
    rho_ideal: float
    rho_eager: float
    differ: int
    elements: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def capture(model: Any, ids: Tensor) -> Captured:
    """Inputs of both norms of layer 0 on `ids` (B, T), and the gradients that arrive at them.

    The loss is that of predicting each next token.
    """
    layer = model.model.layers[0]
    norms = {
        "input_layernorm": layer.input_layernorm,
        "post_attention_layernorm": layer.post_attention_layernorm,
    }
    seen: dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for tensor in outputs:
                tensor.retain_grad()
            seen[name] = (inputs, outputs)

        return keep

    handles = [norm.register_forward_hook(hook(name)) for name, norm in norms.items()]
    model(ids, labels=ids, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    captured: Captured = {}
    for name, (inputs, outputs) in seen.items():
        norm = norms[name]
        x, residual, *_ = (*inputs, None)
        dy, dh, *_ = (*(tensor.grad for tensor in outputs), None)
        found = {"x": x, "residual": residual, "weight": norm.weight, "dy": dy, "dh": dh}
        captured[name] = {
            "eps": norm.eps,
            **{k: v.detach().clone() for k, v in found.items() if v is not None},
        }
    return captured


def measure(captured: Captured, backends: list[str]) -> list[ParityRow]:
    """Every captured norm on every backend: y, h and all gradients."""
    rows = []
    for case, inputs in captured.items():
        gold, eager = reference(inputs, torch.float64), outputs_of(inputs, "eager")
        label = f"{case}, add fused" if "residual" in inputs else case
        for backend in backends:
            ours = outputs_of(inputs, backend)
            rows += [
                _row(label, backend, name, ours[name], gold[name], eager[name]) for name in ours
            ]
    return rows


def outputs_of(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """y, dx, dw, and with a residual h, of a backend of rms_norm with Llama's casting."""
    x, weight = (inputs[name].clone().requires_grad_() for name in ("x", "weight"))
    options: dict[str, Any] = {"casting": "llama", "implementation": backend}
    if "residual" not in inputs:
        y = swathe.rms_norm(x, weight, inputs["eps"], **options)
        dx, dw = torch.autograd.grad(y, (x, weight), inputs["dy"])
        return {"y": y.detach(), "dx": dx, "dw": dw}
    residual = inputs["residual"].clone().requires_grad_()
    y, h = swathe.rms_norm(x, weight, inputs["eps"], residual=residual, **options)
    arriving = (inputs["dy"], inputs["dh"])
    dx, dw = torch.autograd.grad((y, h), (x, weight), arriving)
    return {"h": h.detach(), "y": y.detach(), "dx": dx, "dw": dw}


def reference(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the eager formula in `dtype` on h, the sum as the model rounds it."""
    h = inputs["x"] + inputs["residual"] if "residual" in inputs else inputs["x"]
    h, weight = (tensor.to(dtype).requires_grad_() for tensor in (h, inputs["weight"]))
    y = swathe.rms_norm(h, weight, inputs["eps"], casting="fp32", implementation="eager")
    dx, dw = torch.autograd.grad(y, (h, weight), inputs["dy"].to(dtype))
    dh = inputs["dh"].to(dtype) if "dh" in inputs else 0
    return {"h": h.detach(), "y": y.detach(), "dx": dx + dh, "dw": dw}


def _row(
    case: str, backend: str, name: str, ours: Tensor, gold: Tensor, eager: Tensor
) -> ParityRow:
    from swathe.kernels.core.testing import Pool

    pool = Pool(name, ours.dtype)
    pool.add(ours, gold, eager)
    return ParityRow(
        case=case,
        backend=backend,
        output=name,
        dtype=str(ours.dtype).removeprefix("torch."),
        rms=(pool.ours / pool.count) ** 0.5,
        rms_eager=(pool.eager / pool.count) ** 0.5,
        rho_ideal=pool.rho_ideal,
        rho_eager=pool.rho_eager,
        differ=int((ours != eager).sum()),
        elements=pool.count,
    )


def in_own_process(captured: Captured, device: str) -> list[ParityRow]:
    """`measure` on all fused backends of this machine, Triton's interpreted where it must be."""
    interpret = {} if device.startswith("cuda") else {"TRITON_INTERPRET": "1"}
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captured.pt"
        torch.save(captured, file)
        done = subprocess.run(
            [sys.executable, "-m", "bench.demo.parity", str(file), device],
            cwd=ROOT,
            env=inherited | interpret,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [ParityRow(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def fused_backends(device: str) -> dict[str, str]:
    """The fused backends of rms_norm that belong to a device, each with "ok" or why it is out."""
    names = ("triton",) if device.startswith("cuda") else ("triton", "cpp")
    known = swathe.backends("rms_norm")["rms_norm"]
    return {name: known[name] for name in names}


def _main(file: str, device: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(ROOT / "tests"))
        from support import interpreter

        interpreter.install()
    captured = torch.load(file, weights_only=True, map_location=device)
    usable = [name for name, state in fused_backends(device).items() if state == "ok"]
    print(json.dumps([row.to_json() for row in measure(captured, usable)]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
