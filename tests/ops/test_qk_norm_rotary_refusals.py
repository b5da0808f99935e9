"""What qk_norm_rotary refuses, and what each message says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary, resolve_qk_norm_rotary

Q, K, W = torch.ones(2, 3, 5, 8), torch.ones(2, 1, 5, 8), torch.ones(8)
TABLE = torch.ones(5, 8)
ARGUMENTS: dict[str, Any] = {
    "q": Q, "k": K, "q_weight": W, "k_weight": W, "eps": 1e-6, "cos": TABLE, "sin": TABLE,
}  # fmt: skip


def call(**changed: Any) -> Callable[[], object]:
    return lambda: qk_norm_rotary(**{**ARGUMENTS, **changed})


class DTensor(Tensor):
    """torch's own needs several processes; the name is what is looked at."""


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "q without heads": (call(q=Q[0]), ValueError, r"q has shape \(3, 5, 8\).*\(B, H, S, D\)"),
    "no features": (call(q=Q[..., :0]), ValueError, "one or more features"),
    "q of integers": (call(q=Q.int()), TypeError, "q is torch.int32"),
    "k of another length": (
        call(k=K[:, :, :4]),
        ValueError,
        r"k is \(2, 1, 4, 8\).*\(2, heads, 5, 8\)",
    ),
    "k with three dims": (call(k=K[0]), ValueError, r"k is \(1, 5, 8\)"),
    "k elsewhere": (call(k=K.to("meta")), ValueError, "on meta.*on cpu"),
    "k of another dtype": (
        call(k=K.bfloat16()),
        TypeError,
        "q is torch.float32 and k is torch.bfloat16",
    ),
    "k without weight": (call(k_weight=None), ValueError, "k is given without k_weight"),
    "weight without k": (call(k=None), ValueError, "k_weight is given without k"),
    "q_weight size": (call(q_weight=torch.ones(4)), ValueError, r"q_weight is \(4,\).*\(8,\)"),
    "k_weight device": (call(k_weight=W.to("meta")), ValueError, "k_weight is .* on meta"),
    "weight of integers": (call(q_weight=W.int()), TypeError, "q_weight is torch.int32"),
    "weights of two dtypes": (call(k_weight=W.half()), TypeError, "must have one dtype"),
    "eps": (call(eps=-1.0), ValueError, "eps=-1.0"),
    "nan eps": (call(eps=float("nan")), ValueError, "eps=nan"),
    "casting": (call(casting="lama"), ValueError, "casting='lama' .did you mean 'llama'"),
    "norm_casting": (
        call(norm_casting="gema"),
        ValueError,
        "norm_casting='gema' .did you mean 'gemma'",
    ),
    "odd rotary_dim": (call(rotary_dim=3), ValueError, "rotary_dim=3"),
    "wide rotary_dim": (call(rotary_dim=10), ValueError, "rotary_dim=10"),
    "tables of another width": (call(rotary_dim=4), ValueError, "cos and sin have 8 entries"),
    "sin unlike cos": (call(sin=TABLE[:4]), ValueError, r"sin \(4, 8\)"),
    "too few rows": (call(cos=TABLE[:4], sin=TABLE[:4]), ValueError, r"cos and sin are \(4, 8\)"),
    "tables elsewhere": (
        call(cos=TABLE.to("meta"), sin=TABLE.to("meta")),
        ValueError,
        "must be on cpu",
    ),
    "positions of floats": (call(positions=torch.ones(5)), TypeError, "int32 or int64"),
    "positions of another length": (
        call(positions=torch.ones(4, dtype=torch.int64)),
        ValueError,
        r"positions are \(4,\)",
    ),
    "sections": (call(mrope_section=(1, 1, 1)), ValueError, "sum to 4"),
    "sections without an axis": (call(mrope_section=(2, 1, 1)), ValueError, r"\(3, 5, 8\)"),
    "backend name": (call(implementation="trion"), ValueError, "did you mean 'triton'"),
    "double": (
        call(
            q=Q.double(),
            k=K.double(),
            q_weight=W.double(),
            k_weight=W.double(),
            implementation="triton",
        ),
        UnsupportedFeature,
        "not float64",
    ),
    "tables that need a gradient": (
        call(cos=TABLE.clone().requires_grad_(), implementation="triton"),
        UnsupportedFeature,
        "table_grad=True.*'eager'",
    ),
    "heads too wide": (
        lambda: qk_norm_rotary(
            torch.ones(1, 1, 1, 1026),
            None,
            torch.ones(1026),
            None,
            1e-6,
            torch.ones(1, 1026),
            torch.ones(1, 1026),
            implementation="triton",
        ),
        UnsupportedFeature,
        "takes sizes up to 1024, not 1026",
    ),
    "DTensor": (
        call(q=Q.as_subclass(DTensor), k=None, k_weight=None, implementation="triton"),
        TypeError,
        "was given a DTensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function()


def test_tables_that_need_a_gradient_are_served_by_eager() -> None:
    cos = TABLE.clone().requires_grad_()
    q, _ = qk_norm_rotary(**{**ARGUMENTS, "cos": cos})
    q.sum().backward()
    assert cos.grad is not None
    with torch.no_grad():
        qk_norm_rotary(**{**ARGUMENTS, "cos": cos}, implementation="triton")


def test_choice_on_another_device_is_refused() -> None:
    choice = replace(resolve_qk_norm_rotary(Q, W, TABLE, "eager"), devices=frozenset({"cuda"}))
    with pytest.raises(ValueError, match=r"the input is on cpu.*chosen for \['cuda'\]"):
        qk_norm_rotary(**ARGUMENTS, implementation=choice)


def test_meta_tensors_take_the_definition() -> None:
    meta = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in ARGUMENTS.items()}
    q, k = qk_norm_rotary(**meta)
    assert q.shape == Q.shape and k.shape == K.shape and q.device.type == "meta"


def test_explain_names_the_backends() -> None:
    text = swathe.explain("qk_norm_rotary", size=128, dtype=torch.bfloat16)
    assert "eager" in text and "triton" in text


def test_a_choice_does_not_bypass_the_table_check() -> None:
    choice = resolve_qk_norm_rotary(Q, W, TABLE, "triton")
    with pytest.raises(ValueError, match=r"cos or sin requires a gradient.*'eager'"):
        qk_norm_rotary(
            Q, K, W, W, 1e-6, TABLE.clone().requires_grad_(), TABLE, implementation=choice
        )
