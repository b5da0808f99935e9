"""swathe's providers against a small double of tritonbench's interface, as of its commit db2155c.

The double keeps what a provider meets: how benchmarks are registered and found, which inputs an
operator hands over, and that one graph is differentiated again and again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import tritonbench


class Registry(dict[str, dict[str, SimpleNamespace]]):
    """Benchmarks by operator and name, as `register_benchmark` leaves them."""

    def register_benchmark(
        self,
        operator_name: str | None = None,
        func_name: str | None = None,
        baseline: bool = False,
        enabled: bool = True,
        fwd_only: bool = False,
        label: str | None = None,
    ) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            assert operator_name and func_name, "found by its module otherwise, which is not ours"
            facts = SimpleNamespace(baseline=baseline, enabled=enabled, fwd_only=fwd_only)
            self.setdefault(operator_name, {})[func_name] = facts
            return lambda self, *inputs: function(self, *inputs)

        return decorate


class Operator:
    """What operators share; `inputs` yields what benchmarks are called with."""

    eps, causal, sm_scale, output = 1e-6, True, 8**-0.5, "a table"

    def __init__(self, tb_args: argparse.Namespace, extra_args: list[str] | None = None) -> None:
        self.dtype = getattr(torch, tb_args.precision)
        self.ran: tuple[int, int] | None = None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, requires_grad=True)

    def inputs(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def baseline(self, *inputs: Any) -> Callable[[], Any]:
        raise NotImplementedError

    def leaves(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]

    def run(self, warmup: int, rep: int) -> None:
        self.ran = warmup, rep


class RmsNorm(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return 32, self.randn(5, 32)

    def baseline(self, columns: int, x: Tensor) -> Any:
        weight = torch.ones(columns)
        return lambda: weight * F.rms_norm(x.float(), (columns,), None, self.eps).to(x.dtype)


class LayerNorm(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return self.randn(5, 32), (32,), self.randn(32), self.randn(32), 1e-5

    def baseline(self, *inputs: Any) -> Any:
        return lambda: F.layer_norm(*inputs)


class Gated(Operator):
    act: Any = staticmethod(F.silu)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        module: Any = nn.Module()
        module.gate_proj, module.up_proj = (nn.Linear(8, 24, dtype=self.dtype) for _ in range(2))
        module.down_proj = nn.Linear(24, 8, dtype=self.dtype)
        self.baseline_op = self.baseline_model = module

    def inputs(self) -> tuple[Any, ...]:
        return (self.randn(2, 5, 8),)

    def baseline(self, x: Tensor) -> Any:
        mlp = self.baseline_op
        return lambda: mlp.down_proj(self.act(mlp.gate_proj(x)) * mlp.up_proj(x))


class Gelu(Gated):
    act = staticmethod(lambda x: F.gelu(x, approximate="tanh"))


class Rope(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return 32, 6

    def prepare_input(self, hidden_size: int, length: int) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        heads = (hidden_size // 8, 2)
        self.q, self.k = (self.randn(1, length, h, 8).transpose(1, 2).contiguous() for h in heads)
        angles = torch.arange(length)[:, None] * 0.5 ** torch.arange(4)
        angles = torch.cat((angles, angles), -1)[None]
        tables = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return self.q, self.k, *tables, torch.arange(length)[None]

    def baseline(self, hidden_size: int, length: int) -> Any:
        q, k, cos, sin, _ = self.prepare_input(hidden_size, length)

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        return lambda: (turn(q), turn(k))

    def leaves(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        return [self.q, self.k]


class CrossEntropy(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return self.randn(7, 50), torch.randint(50, (7,))

    def baseline(self, logits: Tensor, labels: Tensor) -> Any:
        return lambda: F.cross_entropy(logits, labels)


class LinearCrossEntropy(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return self.randn(7, 16), self.randn(50, 16), torch.randint(50, (7,))

    def baseline(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return lambda: F.cross_entropy(hidden @ weight.T, labels)


class Attention(Operator):
    def inputs(self) -> tuple[Any, ...]:
        return tuple(self.randn(2, 3, 9, 8) for _ in range(3))

    def baseline(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        given: Any = {"is_causal": self.causal, "scale": self.sm_scale}
        return lambda: F.scaled_dot_product_attention(q, k, v, **given)


OPERATORS = {
    "rms_norm": RmsNorm,
    "layer_norm": LayerNorm,
    "swiglu": Gated,
    "geglu": Gelu,
    "rope": Rope,
    "cross_entropy": CrossEntropy,
    "fused_linear_cross_entropy": LinearCrossEntropy,
    "flash_attention": Attention,
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The double in the place of the package."""
    found = Registry()

    def parser() -> argparse.ArgumentParser:
        known = argparse.ArgumentParser(allow_abbrev=False)
        known.add_argument("--op")
        known.add_argument("--precision", default="float32")
        known.add_argument("--csv", action="store_true")
        for name in ("--warmup", "--iter"):
            known.add_argument(name, type=int, default=25)
        return known

    members = {
        "tritonbench": {},
        "tritonbench.operators": {"load_opbench_by_name": OPERATORS.__getitem__},
        "tritonbench.utils": {},
        "tritonbench.utils.parser": {"get_parser": parser},
        "tritonbench.utils.triton_op": {"register_benchmark": found.register_benchmark},
    }
    for name, attributes in members.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tritonbench, "find_spec", lambda name: object())
    yield found


def differentiated(outputs: Any, leaves: list[Tensor], arriving: list[Tensor]) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*torch.autograd.grad(outputs, leaves, arriving, retain_graph=True)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tritonbench.PROVIDERS)
def test_each_provider_computes_the_baseline(name: str, precision: str, registry: Registry) -> None:
    torch.manual_seed(0)
    args = argparse.Namespace(precision=precision)
    operator: Any = tritonbench.add(name, OPERATORS[name])(tb_args=args, extra_args=[])
    inputs = operator.inputs()
    results = []
    for make in (operator.baseline, operator.swathe):
        call = make(*inputs)
        call._name = name  # tritonbench names what it times
        outputs, leaves = call(), operator.leaves(inputs)
        torch.manual_seed(1)
        every = outputs if isinstance(outputs, tuple) else (outputs,)
        arriving = [torch.randn(t.shape, dtype=t.dtype) for t in every]
        first, again = (differentiated(outputs, leaves, arriving) for _ in range(2))
        assert all(map(torch.equal, first, again)) and len(first) == len(leaves) > 0
        results.append([*every, *first])
    near = 1e-5 if precision == "float32" else 4e-2
    torch.testing.assert_close(results[1], results[0], rtol=near, atol=near)
    assert registry[name]["swathe"].enabled and not registry[name]["swathe"].baseline
    assert {*registry[name]} == {"swathe", "swathe_triton"}


def test_a_named_backend_is_the_one_that_runs(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        tritonbench.swathe,
        "rms_norm",
        lambda x, *_, implementation: (asked.append(implementation), x)[1],
    )
    args = argparse.Namespace(precision="float32")
    operator: Any = tritonbench.add("rms_norm", RmsNorm)(tb_args=args)
    for name in ("swathe", "swathe_triton"):
        getattr(operator, name)(*operator.inputs())()
    assert asked == ["auto", "triton"]
    monkeypatch.setattr(tritonbench.swathe, "backends", lambda op: {op: {"triton": "no GPU"}})
    tritonbench.add("rms_norm", RmsNorm)
    assert [facts.enabled for facts in registry["rms_norm"].values()] == [True, False]
    with pytest.raises(ValueError, match="no provider for operator 'gemm'; there are: rms_norm,"):
        tritonbench.add("gemm", RmsNorm)


def test_command(
    registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tritonbench.main(["--op", "rms_norm,rope", "--warmup", "1", "--causal"]) == 0
    assert capsys.readouterr().out == "a table\na table\n"
    assert {*registry} == {"rms_norm", "rope"}
    for wrong in ([], ["--op", "gemm"]):
        with pytest.raises(SystemExit):
            tritonbench.main(wrong)
        assert "allowed: rms_norm,layer_norm" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(tritonbench, "find_spec", lambda name: None)
    assert tritonbench.main([]) == 2
    assert "tritonbench is not installed; clone" in capsys.readouterr().err
