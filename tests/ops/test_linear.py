"""linear: the contract, when torch computes, refusals, and Linear modules in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.tensors import DTYPES, rows
from swathe.kernels.core import cpp
from swathe.kernels.core.contract import check
from swathe.kernels.linear import _cpp
from swathe.kernels.linear.api import linear
from swathe.kernels.linear.contract import CONTRACT
from swathe.modeling.layers.linear import Linear, beside_weights, project

needs_cpp = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entry points that were called, in their order."""
    made: list[str] = []
    real = _cpp.call

    def noted(name: str, packed: bytes) -> Any:
        made.append(name)
        return real(name, packed)

    monkeypatch.setattr(_cpp, "call", noted)
    return made


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype: torch.dtype) -> None:
    check(CONTRACT, "cpp", dtypes=[dtype], seeds=2)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_is_the_same_alone(dtype: torch.dtype) -> None:
    x, w = rows(7, 100, dtype=dtype), rows(70, 100, dtype=dtype, seed=1)
    together = linear(x, [w], implementation="cpp")[0]
    with torch.no_grad():
        for i in range(7):
            assert torch.equal(linear(x[i], [w], implementation="cpp")[0], together[i])
        assert torch.equal(linear(x, [w[3:5]], implementation="cpp")[0], together[:, 3:5])


@needs_cpp
def test_not_a_number_stays_in_its_row_and_column() -> None:
    x, w = rows(5, 40), rows(9, 40, seed=1)
    x[1, 3], w[2, 7] = torch.nan, torch.inf
    y = linear(x, [w], implementation="cpp")[0]
    good = torch.ones(5, 9, dtype=torch.bool)
    good[1], good[:, 2] = False, False
    assert bool(y[good].isfinite().all()) and not bool(y[~good].isfinite().any())


@needs_cpp
def test_torch_computes_what_is_not_reading_weights(calls: list[str]) -> None:
    few, many = rows(4, 32), rows(17, 32)
    w = rows(8, 32, seed=1)
    leaf = w.clone().requires_grad_()
    expected = F.linear(few, w)

    def compiled(x: Tensor) -> Tensor:
        return linear(x, [w], implementation="cpp")[0]

    linear(few, [leaf], implementation="cpp")[0].sum().backward()
    torch.testing.assert_close(leaf.grad, few.sum(0).expand(8, -1))
    torch.testing.assert_close(linear(many, [w], implementation="cpp")[0], F.linear(many, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(few, [w], implementation="cpp")[0].dtype == torch.bfloat16
    found = torch.func.vmap(compiled)(few)
    torch.testing.assert_close(found, expected)
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(few), expected)
    assert not calls
    torch.testing.assert_close(linear(few, [w], implementation="cpp")[0], expected)
    assert calls == ["swathe_linear"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((rows(2, 5), []), "0 weights and 0 biases"),
        ((rows(2, 5), [rows(3, 5)], [None, None]), "1 weights and 2 biases"),
        ((rows(2, 5), [rows(3, 4)]), r"x is \(2, 5\) and a weight \(3, 4\)"),
        ((rows(2, 5), [rows(3, 5)], [rows(4)]), r"a bias is \(4,\); the weight \(3, 5\)"),
        ((rows(2, 5), [rows(3, 5).to("meta")]), "a weight on meta; move them together"),
    ],
)
def test_what_does_not_fit(arguments: tuple[Any, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        linear(*arguments)


@needs_cpp
def test_types_that_differ_are_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(rows(2, 5), [rows(3, 5, dtype=torch.bfloat16)], implementation="cpp")


@needs_cpp
def test_several_projections_are_one_call(calls: list[str]) -> None:
    x = rows(1, 2, 300)
    three = [Linear(300, n, bias=n == 250) for n in (300, 250, 350)]
    assert all(isinstance(p, nn.Linear) and beside_weights(p) is None for p in three)
    with torch.no_grad():
        together = project(x, *three)
        assert calls == ["swathe_linear"]
        for p, y in zip(three, together, strict=True):
            assert torch.equal(p(x), y)
            torch.testing.assert_close(F.linear(x, p.weight, p.bias), y)
        del calls[:]
        seen: list[str] = []
        three[1].register_forward_hook(lambda *_: seen.append("called"))
        for one, other in zip(project(x, *three), together, strict=True):
            assert torch.equal(one, other)
        assert seen == ["called"] and len(calls) == 3
    del calls[:]
    project(x, *three)[0].sum().backward()
    assert not calls and three[0].weight.grad is not None
    assert "backend=cpp" in repr(three[0])


@needs_cpp
def test_small_weights_and_many_rows_take_no_detour(calls: list[str]) -> None:
    with torch.no_grad():
        Linear(64, 64)(rows(1, 64))
        Linear(300, 300)(rows(17, 300))
    assert not calls
