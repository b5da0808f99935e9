"""swathe as a provider in tritonbench (github.com/meta-pytorch/tritonbench), beside its own.

    python -m bench.tritonbench --op rms_norm --mode fwd --metrics latency,speedup,accuracy

needs tritonbench installed, and takes the options of its run.py that choose what is measured
(--only, --mode, --metrics, --precision, --num-inputs, --csv, ...). Several of its operators also
import liger-kernel, whether it is measured or not. In a suite of one's own,

    Operator = bench.tritonbench.add("rms_norm", load_opbench_by_name("rms_norm"))

gives an operator two more benchmarks: "swathe", whose backend is chosen as for any caller, and
"swathe_triton", which takes the Triton kernels or fails. Each computes what the operator's
baseline does, with the baseline's own weights, so that the metric `accuracy` of --mode fwd holds it
to that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import swathe

# takes tritonbench's operator, its inputs and a backend's name; returns what is timed
Provider = Callable[..., Callable[[], Any]]
_NAMES = {"swathe": "auto", "swathe_triton": "triton"}


def rms_norm(operator: Any, columns: int, x: Tensor, *, implementation: str) -> Any:
    """A weight of ones in fp32, as LlamaRMSNorm is made there."""
    weight = torch.ones(columns, device=x.device, requires_grad=True)
    return lambda: swathe.rms_norm(x, weight, operator.eps, implementation=implementation)


def layer_norm(
    operator: Any,
    x: Tensor,
    shape: tuple[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    implementation: str,
) -> Any:
    """F.layer_norm's arguments."""
    return lambda: swathe.layer_norm(x, weight, bias, eps, implementation=implementation)


def gated_mlp(mlp: str, act: str, operator: Any, x: Tensor, *, implementation: str) -> Any:
    """The whole MLP, projections too, through the baseline's module of that name."""
    module = getattr(operator, mlp)

    def call() -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(
            swathe.gated_mlp_act(gate, up, act=act, implementation=implementation)
        )

    return call


def rope(operator: Any, hidden_size: int, length: int, *, implementation: str) -> Any:
    """q and k of (1, H, S, D) that the operator makes and keeps for its backward."""
    q, k, cos, sin, _ = operator.prepare_input(hidden_size, length)
    return lambda: swathe.rotary(q, k, cos, sin, implementation=implementation)


def cross_entropy(operator: Any, logits: Tensor, labels: Tensor, *, implementation: str) -> Any:
    """The mean, in the logits' dtype as torch's is."""

    def call() -> Tensor:
        return swathe.cross_entropy(logits, labels, implementation=implementation).to(logits.dtype)

    return call


def linear_cross_entropy(
    operator: Any, hidden: Tensor, weight: Tensor, labels: Tensor, *, implementation: str
) -> Any:
    """The mean, in the inputs' dtype as torch's is."""

    def call() -> Tensor:
        loss = swathe.linear_cross_entropy(hidden, weight, labels, implementation=implementation)
        return loss.to(hidden.dtype)

    return call


def attention(operator: Any, q: Tensor, k: Tensor, v: Tensor, *, implementation: str) -> Any:
    """(B, H, S, D) in and out."""
    options: Any = {"causal": operator.causal, "scale": operator.sm_scale}
    return lambda: swathe.attention(q, k, v, **options, implementation=implementation).transpose(
        1, 2
    )


# tritonbench's operators: our op, which says what is installed, and the provider
PROVIDERS: dict[str, tuple[str, Provider]] = {
    "rms_norm": ("rms_norm", rms_norm),
    "layer_norm": ("layer_norm", layer_norm),
    "swiglu": ("gated_mlp_act", partial(gated_mlp, "baseline_op", "silu")),
    "geglu": ("gated_mlp_act", partial(gated_mlp, "baseline_model", "gelu_tanh")),
    "rope": ("rotary", rope),
    "cross_entropy": ("cross_entropy", cross_entropy),
    "fused_linear_cross_entropy": ("linear_cross_entropy", linear_cross_entropy),
    "flash_attention": ("attention", attention),
}


def add(name: str, operator: type) -> type:
    """Register our benchmarks with an operator's class, which is returned.

    One whose backend cannot run here is registered as not enabled. ValueError for an operator that
    no provider is written for.
    """
    if name not in PROVIDERS:
        raise ValueError(f"no provider for operator {name!r}; there are: {', '.join(PROVIDERS)}")
    register = import_module("tritonbench.utils.triton_op").register_benchmark
    op, provider = PROVIDERS[name]
    states = {"auto": "ok", **swathe.backends(op)[op]}
    for benchmark, backend in _NAMES.items():

        def method(self: Any, *inputs: Any, _backend: str = backend) -> Callable[[], Any]:
            return provider(self, *inputs, implementation=_backend)

        enabled = states.get(backend) == "ok"
        registered = register(operator_name=name, func_name=benchmark, enabled=enabled)(method)
        setattr(operator, benchmark, registered)
    return operator


def main(given: list[str] | None = None) -> int:
    """Run tritonbench's operators with ours added; returns the exit status."""
    if find_spec("tritonbench") is None:
        print(
            "bench.tritonbench: tritonbench is not installed; clone "
            "https://github.com/meta-pytorch/tritonbench and run its install.py, "
            "or use python -m bench.gpu, which needs none of it",
            file=sys.stderr,
        )
        return 2
    load = import_module("tritonbench.operators").load_opbench_by_name
    parser = import_module("tritonbench.utils.parser").get_parser()
    asked, others = parser.parse_known_args(sys.argv[1:] if given is None else given)
    names = asked.op.split(",") if asked.op else []
    if unknown := [name for name in names if name not in PROVIDERS] or not names:
        parser.error(f"--op: {unknown or 'none'} given; allowed: {','.join(PROVIDERS)}")
    for asked.op in names:
        operator: Any = add(asked.op, load(asked.op))(tb_args=asked, extra_args=others)
        operator.run(asked.warmup, asked.iter)
        if asked.csv:
            operator.output.write_csv_to_file(sys.stdout)
        else:
            print(operator.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
