"""Forwards read on symbols: one expression for one computation, and no guess at anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swathe.modeling.hf.patching.canonical import Expression
from swathe.modeling.hf.patching.symbolic import Unreadable, expression_of, trace

A: Expression = ("input", 0)
B: Expression = ("input", 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b: a * b, lambda a, b: b * a),
        (lambda a, b: (a + b) + 1, lambda a, b: a + (1 + b)),
        (lambda a, b: a - b, lambda a, b: -b + a),
        (lambda a, b: torch.rsqrt(a) * b, lambda a, b: b / torch.sqrt(a)),
        (lambda a, b: a.pow(2) + b, lambda a, b: b + torch.square(a)),
        (lambda a, b: a * a * b, lambda a, b: b * a**2),
        (lambda a, b: a.float() * b, lambda a, b: a.to(dtype=torch.float32) * b),
        (lambda a, b: (a.float() * b).type_as(a), lambda a, b: (b * a.float()).to(a.dtype)),
        (lambda a, b: a.mean(-1, keepdim=True), lambda a, b: torch.mean(a, dim=-1, keepdim=True)),
        (
            lambda a, b: a.var(-1, unbiased=False, keepdim=True),
            lambda a, b: (a - a.mean(-1, keepdim=True)).square().mean(-1, True),
        ),
        (lambda a, b: F.silu(a).contiguous(), lambda a, b: torch.nn.functional.silu(a)),
        (lambda a, b: a / 2, lambda a, b: 0.5 * a),
    ],
)
def test_two_ways_of_writing_are_one(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert expression_of(one, A, B) == expression_of(other, A, B)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda a, b: (a * b).float(), lambda a, b: a.float() * b),
        (lambda a, b: a - b, lambda a, b: b - a),
        (lambda a, b: torch.sqrt(a + 1), lambda a, b: torch.sqrt(a) + 1),
        (lambda a, b: a.mean(-1, keepdim=True), lambda a, b: a.mean(-2, keepdim=True)),
        (lambda a, b: a.mean(-1, keepdim=True), lambda a, b: a.mean(-1)),
        (
            lambda a, b: a.var(-1, keepdim=True),
            lambda a, b: a.var(-1, unbiased=False, keepdim=True),
        ),
        (lambda a, b: torch.sqrt(a.pow(2)), lambda a, b: a),
        (lambda a, b: a.chunk(2, -1)[0], lambda a, b: a.chunk(2, -1)[1]),
        (lambda a, b: F.gelu(a), lambda a, b: F.gelu(a, approximate="tanh")),
        (lambda a, b: a.clamp(max=1), lambda a, b: a),
        (lambda a, b: a.to(b.dtype), lambda a, b: a),
    ],
)
def test_different_computations_differ(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert expression_of(one, A, B) != expression_of(other, A, B)


class Scaled(nn.Module):
    """Scales by a weight in the way that `body` says."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.flag = nn.Parameter(torch.ones(4)), True
        self.act, self.drop, self.body = nn.SiLU(), nn.Dropout(0.0), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def test_flags_are_taken_as_they_are_and_parts_without_parameters_are_run_through() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return self.drop(self.act(x)) * self.weight if self.flag else x

    module = Scaled(body)
    read = trace(module)
    assert read.expression == ("mul", ("parameter", "weight"), ("silu", A))
    assert set(read.inlined) == {"act", "drop"}
    module.flag = False
    assert trace(module).expression == A


def test_a_branch_on_the_dtype_of_a_weight_is_noted() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) if self.weight.dtype == torch.bfloat16 else x

    assert trace(Scaled(body)).read_dtype
    assert trace(Scaled(body)).expression == A
    assert trace(Scaled(body).bfloat16()).expression == ("to", torch.bfloat16, A)


def _grow(self: Any, x: Tensor) -> Tensor:
    x += self.weight
    return x


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x: x if x.sum() > 0 else -x, "branches on"),
        (lambda self, x: x if x.shape[0] == 1 else -x, "branches on"),
        (lambda self, x: x.view(*x.shape[:-1], 2, 2), "goes through"),
        (lambda self, x: x * float(self.weight[0]), "needs the number"),
        (_grow, "writes in place"),
        (lambda self, x: x.mul_(self.weight), "writes in place"),
        (lambda self, x: F.relu(x, inplace=True), "writes in place"),
        (lambda self, x: x if self.training else x * self.weight, "differs between training"),
        (lambda self, x: F.dropout(x, 0.1, self.training), "differs between training"),
        (lambda self, x: (x, x), "returns a tuple"),
        (lambda self, x: 1 / 0, "cannot be read (ZeroDivisionError)"),
        (lambda self, x: x.chunk(2, 0)[0], "cuts a tensor"),
    ],
)
def test_what_cannot_be_read_says_why(body: Callable[..., Any], reason: str) -> None:
    with pytest.raises(Unreadable) as found:
        trace(Scaled(body))
    assert reason in str(found.value)


class Asking(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * 2 if isinstance(x, Tensor) else x


def test_a_forward_that_asks_what_it_was_given_is_not_believed() -> None:
    with pytest.raises(Unreadable, match=r"calls isinstance\(\)"):
        trace(Asking())


def test_reading_a_module_leaves_it_as_it_was() -> None:
    module = Scaled(lambda self, x: setattr(self, "seen", 1) or x * self.weight)
    before = dict(vars(module))
    state = torch.get_rng_state()
    assert trace(module).expression == ("mul", A, ("parameter", "weight"))
    assert vars(module) == before
    assert torch.equal(torch.get_rng_state(), state)
