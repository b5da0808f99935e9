"""linear with weights in int8: their numbers, the same bits however many rows, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.tensors import DTYPES, instruction_sets, rows
from swathe.kernels.core import cpp
from swathe.kernels.core.contract import check
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import Backend, register_backend, unregister_backend
from swathe.kernels.core.spec import FLOATS, Capabilities
from swathe.kernels.linear import _cpp
from swathe.kernels.linear.api import linear, resolve_linear
from swathe.kernels.linear.contract import CONTRACT
from swathe.kernels.linear.eager import quantised

needs_cpp = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_each_row_has_255_steps(dtype: torch.dtype) -> None:
    weight = rows(40, 70, dtype=dtype) * torch.arange(40)[:, None]
    numbers, scales = quantised(weight)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.float32
    assert torch.equal(scales, weight.float().abs().amax(1) / 127)
    assert int(numbers.min()) >= -127 and bool((numbers[1:].abs().amax(1) == 127).all())
    error = (numbers * scales[:, None] - weight).abs()
    assert bool((error <= scales[:, None] * (0.5 + 1e-4)).all())
    assert scales[0] == 0 and not numbers[0].any()


def test_rows_that_are_not_finite_or_hardly_there() -> None:
    weight = rows(4, 8)
    weight[0, 3], weight[1, 2], weight[2] = torch.inf, torch.nan, 1e-45
    numbers, scales = quantised(weight)
    y = linear(torch.ones(8), [numbers], scales=[scales], implementation="eager")[0]
    assert y.isnan().tolist()[:2] == [True, True] and bool(y[2:].isfinite().all())
    # a step below the smallest number is none
    assert scales[2] == 0 and y[2] == 0
    for shape in ((0, 5), (5, 0)):
        empty, none = quantised(torch.empty(shape))
        assert empty.shape == shape and none.tolist() == [0.0] * shape[0]


def test_large_weights_are_read_in_parts() -> None:
    weight = rows(30_000, 40)
    numbers, scales = quantised(weight)
    for some in (slice(0, 50), slice(26_180, 26_250), slice(29_950, 30_000)):
        part = quantised(weight[some])
        assert torch.equal(part[0], numbers[some]) and torch.equal(part[1], scales[some])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_eager_is_the_product_with_the_full_weight(dtype: torch.dtype) -> None:
    x, bias = rows(5, 30, dtype=dtype), rows(9, dtype=dtype)
    numbers, scales = quantised(rows(9, 30, seed=1))
    full, wide = numbers * scales[:, None], torch.promote_types(dtype, torch.float32)
    expected = F.linear(x.to(wide), full.to(wide), bias.to(wide)).to(dtype)
    found = linear(x, [numbers], [bias], scales=[scales], implementation="eager")[0]
    assert found.dtype == dtype and torch.equal(found, expected)


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
def test_contract_on_every_instruction_set(isa: str) -> None:
    with cpp.using_isa(isa):
        check(CONTRACT, "cpp", dtypes=DTYPES, groups=["int8"], seeds=2)


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone(isa: str, dtype: torch.dtype) -> None:
    """Few rows are read as they are, more against widened weights, 256 at a time."""
    x, (w, s) = rows(300, 90, dtype=dtype), quantised(rows(70, 90, seed=1))
    with cpp.using_isa(isa):
        together = linear(x, [w], scales=[s], implementation="cpp")[0]
        for at in ([0], [255, 256], [3, 4, 5, 290, 17]):
            some = linear(x[at], [w], scales=[s], implementation="cpp")[0]
            assert torch.equal(some, together[at])
        part = linear(x, [w[3:5]], scales=[s[3:5]], implementation="cpp")[0]
        assert torch.equal(part, together[:, 3:5])


@needs_cpp
def test_every_int8_is_read_as_it_is() -> None:
    every = torch.arange(-128, 128, dtype=torch.int8)
    weight, scales = torch.diag(every), torch.ones(256)
    for dtype in DTYPES:
        for M in (1, 9):
            x = torch.ones(M, 256, dtype=dtype)
            y = linear(x, [weight], scales=[scales], implementation="cpp")[0]
            assert torch.equal(y, every.to(dtype).expand(M, -1))


@needs_cpp
def test_rows_of_a_larger_weight() -> None:
    (w, s), x = quantised(rows(20, 60)), rows(3, 17)
    apart, at = w[::2, 5:22], s[::2]
    expected = linear(x, [apart.contiguous()], scales=[at.contiguous()], implementation="cpp")
    assert torch.equal(linear(x, [apart], scales=[at], implementation="cpp")[0], expected[0])
    assert torch.equal(linear(x, [apart.T.contiguous().T], scales=[at])[0], expected[0])


@needs_cpp
def test_what_the_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = _cpp.call
    monkeypatch.setattr(_cpp, "call", lambda name, given: (made.append(name), real(name, given))[1])
    (w, s), full, many = quantised(rows(8, 32, seed=1)), rows(8, 32, seed=2), rows(400, 32)

    def run(x: Tensor, **options: Any) -> Tensor:
        return linear(x, [w], scales=[s], **options)[0]

    expected = run(many, implementation="eager")
    leaf = many.clone().requires_grad_()
    run(leaf, implementation="cpp").sum().backward()
    torch.testing.assert_close(leaf.grad, (w * s[:, None]).sum(0).expand(400, -1))
    graph = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(many), expected)
    linear(many, [w, full], scales=[s, None], implementation="cpp")
    assert not made
    torch.testing.assert_close(run(many), expected)
    linear(many[:3], [w, full], scales=[s, None], implementation="cpp")
    assert made == ["swathe_linear"] * 2


W, S = quantised(rows(3, 5))


@pytest.mark.parametrize(
    ("weights", "scales", "kind", "error"),
    [
        ([W], [S, S], ValueError, "1 weights and 2 scales"),
        ([W], [None], TypeError, r"scales are None for a weight in torch.int8"),
        ([rows(3, 5)], [S], TypeError, r"scales are given for a weight in torch.float32"),
        ([W], [S[:2]], ValueError, r"scales are \(2,\) on cpu; .* needs \(3,\) on cpu"),
        ([W], [S.to("meta")], ValueError, r"scales are \(3,\) on meta"),
        ([W], [S.half()], TypeError, "scales are torch.float16; give them in torch.float32"),
    ],
)
def test_what_does_not_fit(weights: Any, scales: Any, kind: type[Exception], error: str) -> None:
    with pytest.raises(kind, match=error):
        linear(rows(2, 5), weights, scales=scales)


def test_a_backend_that_does_not_know_int8_is_refused() -> None:
    record = Capabilities(frozenset({"cpu"}), FLOATS)
    register_backend(Backend("linear", "plain", lambda: lambda x, w, b: (x @ w[0].T,), record))
    try:
        assert torch.equal(
            linear(rows(2, 5), [rows(3, 5)], implementation="plain")[0], rows(2, 5) @ rows(3, 5).T
        )
        with pytest.raises(UnsupportedFeature, match="does not serve weights='int8'"):
            linear(rows(2, 5), [W], scales=[S], implementation="plain")
        with pytest.raises(UnsupportedFeature, match="What works here: 'eager'"):
            resolve_linear(rows(3, 5), "plain", weights="int8")
    finally:
        unregister_backend("linear", "plain")
