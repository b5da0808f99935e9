"""What rotary refuses, and what each message says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import swathe
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.rotary.api import resolve_rotary, rotary

Q, K, T = torch.ones(2, 3, 5, 8), torch.ones(2, 1, 5, 8), torch.ones(5, 8)
Call = Callable[[], object]


def call(q: Any = Q, k: Any = K, cos: Any = T, sin: Any = None, **options: Any) -> Call:
    return lambda: rotary(q, k, cos, cos if sin is None else sin, **options)


BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "three dimensions": (call(torch.ones(3, 5, 8)), ValueError, r"must be \(B, H, S, D\)"),
    "integers": (call(Q.int()), TypeError, "q is torch.int32"),
    "k's batch": (
        call(k=torch.ones(1, 1, 5, 8)),
        ValueError,
        r"k is \(1, 1, 5, 8\).*\(2, heads, 5, 8\)",
    ),
    "k's dtype": (call(k=K.half()), TypeError, "q is torch.float32 and k is torch.float16"),
    "k's device": (call(k=K.to("meta")), ValueError, "on meta.*on cpu"),
    "odd rotary_dim": (call(rotary_dim=5), ValueError, "rotary_dim=5; heads of 8 features"),
    "large rotary_dim": (call(rotary_dim=10), ValueError, "an even number from 2 to 8"),
    "width": (
        call(cos=torch.ones(5, 6)),
        ValueError,
        r"6 entries a row; rotary_dim=8 needs 8.*or 4",
    ),
    "tokens": (
        call(cos=torch.ones(4, 8)),
        ValueError,
        r"cos and sin are \(4, 8\); 2 sequences of 5",
    ),
    "batch": (
        call(cos=torch.ones(3, 5, 8)),
        ValueError,
        r"need \(5, 8\) or \(1, 5, 8\) or \(2, 5, 8\)",
    ),
    "sin's shape": (call(sin=torch.ones(5, 4)), ValueError, r"sin \(5, 4\).*must have one shape"),
    "table's device": (call(cos=T.to("meta")), ValueError, "must be on cpu like q"),
    "integer tables": (call(cos=T.int()), ValueError, "one floating-point dtype"),
    "positions' dtype": (call(positions=torch.ones(5)), TypeError, "must be int32 or int64"),
    "positions' shape": (
        call(positions=torch.ones(4, dtype=torch.long)),
        ValueError,
        r"positions are \(4,\); 2 sequences of 5 tokens need \(5,\)",
    ),
    "positions in a batched table": (
        call(cos=torch.ones(2, 5, 8), positions=torch.ones(5, dtype=torch.long)),
        ValueError,
        r"must be a table \(rows, 8\)",
    ),
    "sections' sum": (call(mrope_section=(1, 1, 1)), ValueError, "sum to 4, half of rotary_dim=8"),
    "two sections": (call(mrope_section=(2, 2)), ValueError, "three numbers of pairs"),
    "no axis of sections": (call(mrope_section=(2, 1, 1)), ValueError, r"need \(3, 5, 8\)"),
    "casting": (call(casting="lama"), ValueError, "did you mean 'llama'"),
    "backend": (call(implementation="trion"), ValueError, "did you mean 'triton'"),
    "a head that fills registers": (
        call(torch.ones(1, 1, 1, 4098), None, torch.ones(1, 4098), implementation="triton"),
        UnsupportedFeature,
        "takes sizes up to 4096, not 4098.*'eager'",
    ),
    "fp64": (
        call(Q.double(), K.double(), implementation="triton"),
        UnsupportedFeature,
        "not float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    refused, error, message = BAD[case]
    with pytest.raises(error, match=message):
        refused()


def test_a_choice_does_not_bypass_the_table_check() -> None:
    choice = resolve_rotary(Q, T, "triton")
    with pytest.raises(ValueError, match=r"cos or sin requires a gradient.*'eager'"):
        rotary(Q, K, T.clone().requires_grad_(), T, implementation=choice)


def test_explain_and_meta() -> None:
    assert "-> eager" in swathe.explain("rotary", device="meta")
    y, _ = swathe.rotary(Q.to("meta"), K.to("meta"), T.to("meta"), T.to("meta"))
    assert y.shape == Q.shape
