"""What the cross-entropies refuse, and what each message says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import swathe.kernels.catalog as catalog
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.cross_entropy.api import cross_entropy, resolve_cross_entropy

X, L = torch.ones(2, 8), torch.tensor([1, 2])
Call = Callable[[], object]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "a scalar": (lambda: cross_entropy(torch.tensor(1.0), L), ValueError, "a last dimension"),
    "no classes": (lambda: cross_entropy(torch.ones(2, 0), L), ValueError, "one or more"),
    "integer logits": (lambda: cross_entropy(X.int(), L), TypeError, "logits is torch.int32"),
    "label dtype": (lambda: cross_entropy(X, L.float()), TypeError, "labels are torch.float32"),
    "probabilities": (lambda: cross_entropy(X, X), TypeError, "int64 or int32 indices"),
    "label shape": (lambda: cross_entropy(X, L[:1]), ValueError, r"labels are \(1,\).*\(2,\)"),
    "label device": (lambda: cross_entropy(X, L.to("meta")), ValueError, "on meta.*on cpu"),
    "reduction": (
        lambda: cross_entropy(X, L, reduction="men"),
        ValueError,
        "did you mean 'mean'",
    ),
    "num_items without mean": (
        lambda: cross_entropy(X, L, reduction="sum", num_items=3),
        ValueError,
        "leave num_items out",
    ),
    "many num_items": (
        lambda: cross_entropy(X, L, num_items=torch.ones(2)),
        ValueError,
        "must be one number",
    ),
    "label_smoothing": (
        lambda: cross_entropy(X, L, label_smoothing=1.5),
        ValueError,
        r"label_smoothing=1.5.*\[0, 1\]",
    ),
    "softcap": (lambda: cross_entropy(X, L, softcap=0.0), ValueError, "softcap=0.0"),
    "nan softcap": (lambda: cross_entropy(X, L, softcap=float("nan")), ValueError, "softcap=nan"),
    "logit_scale": (
        lambda: cross_entropy(X, L, logit_scale=float("inf")),
        ValueError,
        "logit_scale=inf",
    ),
    "z_loss": (lambda: cross_entropy(X, L, z_loss=-1.0), ValueError, "z_loss=-1.0"),
    "ignore_index": (lambda: cross_entropy(X, L, ignore_index=2**40), ValueError, "32 bits"),
    "shift of one label": (
        lambda: cross_entropy(X[0], L[0], shift_labels=True),
        ValueError,
        "needs labels with a dimension",
    ),
    "backend name": (
        lambda: cross_entropy(X, L, implementation="trion"),
        ValueError,
        "did you mean 'triton'",
    ),
    "torch with a cap": (
        lambda: cross_entropy(X, L, softcap=30.0, implementation="torch"),
        UnsupportedFeature,
        "does not serve softcap=True",
    ),
    "double": (
        lambda: cross_entropy(X.double(), L, implementation="triton"),
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
    loss = cross_entropy(X.to("meta"), L.to("meta"))
    assert loss.shape == () and loss.device.type == "meta"
    assert resolve_cross_entropy(X.to("meta")).backend == "eager"


def test_explain_names_every_backend() -> None:
    text = catalog.explain("cross_entropy", softcap=True)
    names = {"eager", "torch", "cpp", "triton"}
    assert all(name in text for name in (*names, "does not serve softcap"))
    assert set(catalog.backends("cross_entropy")["cross_entropy"]) == names
