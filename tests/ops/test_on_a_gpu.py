"""What only a GPU can show of every op: captured graphs, other streams, Inductor's code."""

from __future__ import annotations

import pytest
import torch

from bench.parity import CHECKS
from bench.subject import OPS, subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("check", CHECKS)
def test_check_of_a_gpu(check: str, op: str) -> None:
    of = subject(op)
    for shape in (*of.tiny, *of.checked.values()):
        assert CHECKS[check](of, "triton", "cuda", shape, False) == "ok", shape.name


@pytest.mark.parametrize(("op", "check"), [(op, name) for op in OPS for name in subject(op).more])
def test_check_of_its_own(op: str, check: str) -> None:
    result = subject(op).more[check]("triton", "cuda", False)
    assert result.startswith(("ok", "not run")), result
