"""rotary as a citizen of torch: autograd, torch.func, checkpointing, compile, export."""

from __future__ import annotations

import pytest
import torch

from support import citizen
from support.tensors import DEVICE, rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.rotary import eager
from swathe.kernels.rotary.api import rotary
from swathe.kernels.rotary.contract import CONTRACT, random
from swathe.kernels.rotary.shapes import Shape

OP = "rotary"
KINDS = {
    "halves": {},
    "interleaved, partial": {"interleaved": True},
    "positions": {"positions": True, "compact": True},
    "mrope": {"mrope": True},
}


def problem_of(S: int, kind: str = "halves") -> Problem:
    R = 16 if "partial" in kind else 24
    shape = Shape("citizen", 2, S, 3, 1, 24, R)
    return random(shape, torch.bfloat16, seed=2, device=DEVICE, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_torch_finds_what_it_expects(backend: str, kind: str) -> None:
    citizen.all_of_torch(CONTRACT, backend, lambda S: problem_of(S, kind))


def test_gradcheck_of_the_definition() -> None:
    q, k, cos, sin = (rows(*s).double() for s in ((1, 2, 3, 6), (1, 1, 3, 6), (3, 4), (3, 4)))
    tensors = tuple(t.requires_grad_() for t in (q, k, cos, sin))
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, i=interleaved: eager.rotary(*t, None, None, 4, i, "fp32"), tensors
        )


def test_tables_that_learn_are_served_by_eager_only(backend: str) -> None:
    q, cos, sin = rows(1, 1, 3, 8), rows(3, 8).requires_grad_(), rows(3, 8)
    rotary(q, None, cos, sin).sum().backward()
    assert cos.grad is not None and cos.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"table_grad=True.*'eager'"):
        rotary(q, None, cos, sin, implementation=backend)
    with torch.no_grad():
        rotary(q, None, cos, sin, implementation=backend)


def test_vmap_over_tables_is_refused(backend: str) -> None:
    q, tables = rows(1, 1, 3, 8), rows(4, 3, 8)
    with pytest.raises(NotImplementedError, match="implementation='eager'"):
        torch.func.vmap(lambda t: rotary(q, None, t, t, implementation=backend))(tables)


def test_vmap_over_any_dimension(backend: str) -> None:
    q, k, cos, sin = rows(2, 4, 3, 5, 8), rows(2, 1, 5, 8, 3), rows(5, 8), rows(5, 8, seed=1)

    def turn(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary(one, other, cos, sin, implementation=backend)

    found = torch.func.vmap(turn, in_dims=(2, 4))(q, k)
    for i in range(3):
        expected = turn(q[:, :, i], k[..., i])
        assert torch.equal(found[0][i], expected[0]) and torch.equal(found[1][i], expected[1])


def test_opcheck(backend: str) -> None:
    problem = problem_of(4, "positions")
    q, k, o = problem.inputs["q"], problem.inputs["k"], problem.options
    tables = (o["cos"], o["sin"], o["positions"], None, 24, False)
    citizen.opchecks("rotary_fwd", backend, q, k, *tables, "llama")
    citizen.opchecks("rotary_fwd", backend, q, None, *tables, "fp32")
    citizen.opchecks("rotary_bwd", backend, q, k, *tables)


def test_autocast_leaves_dtypes_alone(backend: str) -> None:
    q, cos, sin = rows(1, 2, 3, 8), rows(3, 8), rows(3, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert rotary(q, None, cos, sin, implementation=backend).dtype == torch.float32
