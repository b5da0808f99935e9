"""What linear_cross_entropy refuses, and what each message says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import swathe.kernels.catalog as catalog
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.linear_cross_entropy.api import (
    linear_cross_entropy,
    resolve_linear_cross_entropy,
)

H, W, L = torch.ones(2, 8), torch.ones(5, 8), torch.tensor([1, 2])
Call = Callable[[], object]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "a scalar": (
        lambda: linear_cross_entropy(torch.tensor(1.0), W, L),
        ValueError,
        "a last dimension",
    ),
    "no features": (
        lambda: linear_cross_entropy(torch.ones(2, 0), torch.ones(5, 0), L),
        ValueError,
        "one or more",
    ),
    "integers": (lambda: linear_cross_entropy(H.int(), W, L), TypeError, "hidden is torch.int32"),
    "label dtype": (lambda: linear_cross_entropy(H, W, L.bool()), TypeError, "labels are torch.b"),
    "label shape": (lambda: linear_cross_entropy(H, W, L[:1]), ValueError, r"labels are \(1,\)"),
    "weight the wrong way": (
        lambda: linear_cross_entropy(H, W.t(), L),
        ValueError,
        r"weight is \(8, 5\).*\(classes, 8\)",
    ),
    "no classes": (lambda: linear_cross_entropy(H, W[:0], L), ValueError, "one or more classes"),
    "bias shape": (
        lambda: linear_cross_entropy(H, W, L, bias=torch.ones(8)),
        ValueError,
        r"bias is \(8,\).*\(5,\)",
    ),
    "weight device": (
        lambda: linear_cross_entropy(H, W.to("meta"), L),
        ValueError,
        "weight is on meta",
    ),
    "mixed dtypes": (
        lambda: linear_cross_entropy(H.bfloat16(), W, L),
        TypeError,
        "weight is torch.float32 and hidden is torch.bfloat16",
    ),
    "bias dtype": (
        lambda: linear_cross_entropy(H, W, L, bias=torch.ones(5).half()),
        TypeError,
        "bias is torch.float16",
    ),
    "chunk_rows": (
        lambda: linear_cross_entropy(H, W, L, chunk_rows=0),
        ValueError,
        "chunk_rows=0; it must be 1 or more",
    ),
    "reduction": (
        lambda: linear_cross_entropy(H, W, L, reduction="summ"),
        ValueError,
        "did you mean 'sum'",
    ),
    "num_items": (
        lambda: linear_cross_entropy(H, W, L, reduction="none", num_items=2),
        ValueError,
        "leave num_items out",
    ),
    "softcap": (lambda: linear_cross_entropy(H, W, L, softcap=-1.0), ValueError, "softcap=-1.0"),
    "backend name": (
        lambda: linear_cross_entropy(H, W, L, implementation="eeger"),
        ValueError,
        "did you mean 'eager'",
    ),
    "double": (
        lambda: linear_cross_entropy(H.double(), W.double(), L, implementation="triton"),
        UnsupportedFeature,
        "not float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_meta_tensors_take_the_definition() -> None:
    meta = [t.to("meta") for t in (H, W, L)]
    assert linear_cross_entropy(*meta).shape == ()
    assert resolve_linear_cross_entropy(*meta[:2]).backend == "eager"
    assert set(catalog.backends("linear_cross_entropy")["linear_cross_entropy"]) == {
        "eager",
        "triton",
    }
