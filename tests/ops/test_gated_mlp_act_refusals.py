"""What gated_mlp_act refuses, and what each message says; how backends are chosen for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import swathe
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.gated_mlp_act.api import (
    ACTS,
    LAYOUTS,
    gated_mlp_act,
    geglu,
    resolve_gated_mlp_act,
)

OP = "gated_mlp_act"
X = torch.ones(2, 8)
Call = Callable[[], object]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "a scalar": (lambda: gated_mlp_act(torch.tensor(1.0)), ValueError, "at least one dimension"),
    "odd packed features": (
        lambda: gated_mlp_act(torch.ones(2, 7)),
        ValueError,
        "even number of features, not 7",
    ),
    "up shape": (
        lambda: gated_mlp_act(X, torch.ones(8)),
        ValueError,
        r"up is \(8,\).*\(2, 8\).*expand it yourself",
    ),
    "up device": (
        lambda: gated_mlp_act(X, torch.ones(2, 8, device="meta")),
        ValueError,
        "on meta.*on cpu",
    ),
    "up dtype": (
        lambda: gated_mlp_act(X, X.bfloat16()),
        TypeError,
        "up is torch.bfloat16 and gate torch.float32; cast one",
    ),
    "integers": (lambda: gated_mlp_act(X.int(), X.int()), TypeError, "gate is torch.int32"),
    "act": (lambda: gated_mlp_act(X, X, act="silo"), ValueError, "did you mean 'silu'"),
    "act that has no gated form": (
        lambda: gated_mlp_act(X, X, act="hardswish"),
        ValueError,
        "act='hardswish'.*allowed",
    ),
    "limit of silu": (
        lambda: gated_mlp_act(X, X, limit=7.0),
        ValueError,
        "limit=7.0 and alpha=None with act='silu'; only act='gpt_oss'",
    ),
    "alpha of gelu": (
        lambda: gated_mlp_act(X, X, act="gelu", alpha=1.0),
        ValueError,
        "alpha=1.0.*leave them out",
    ),
    "limit of zero": (
        lambda: gated_mlp_act(X, X, act="gpt_oss", limit=0.0),
        ValueError,
        "limit=0.0; it must be above zero",
    ),
    "limit that is no number": (
        lambda: gated_mlp_act(X, X, act="gpt_oss", limit=float("nan")),
        ValueError,
        "limit=nan",
    ),
    "limit past fp16": (
        lambda: gated_mlp_act(X.half(), X.half(), act="gpt_oss", limit=1e5),
        ValueError,
        "limit=100000.0.*torch.float16",
    ),
    "alpha without end": (
        lambda: gated_mlp_act(X, X, act="gpt_oss", alpha=float("inf")),
        ValueError,
        "alpha=inf; it must be a finite number",
    ),
    "casting": (
        lambda: gated_mlp_act(X, X, casting="lama"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "did you mean 'llama'",
    ),
    "packed": (
        lambda: gated_mlp_act(X, packed="halfs"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "did you mean 'halves'",
    ),
    "packed with up": (
        lambda: gated_mlp_act(X, X, packed="interleaved"),
        ValueError,
        "packed='interleaved' with up.*leave out packed, or up",
    ),
    "approximate": (
        lambda: geglu(X, X, approximate="tan"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "did you mean 'tanh'",
    ),
    "backend name": (
        lambda: gated_mlp_act(X, X, implementation="trion"),
        ValueError,
        "did you mean 'triton'",
    ),
    "act in resolve": (
        lambda: resolve_gated_mlp_act(X, act="silo"),
        ValueError,
        "did you mean 'silu'",
    ),
    "packed in resolve": (
        lambda: resolve_gated_mlp_act(X, "eager", packed="thirds"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "serves packed='halves' or 'interleaved', not 'thirds'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_choice_on_another_device_is_refused() -> None:
    choice = resolve_gated_mlp_act(X, "eager")
    far = replace(choice, backend="far", devices=frozenset({"cuda"}))
    with pytest.raises(ValueError, match=r"the input is on cpu.*chosen for \['cuda'\]"):
        gated_mlp_act(X, X, implementation=far)


def test_meta_tensors_take_the_definition() -> None:
    x = torch.empty(3, 8, device="meta")
    assert gated_mlp_act(x, x).shape == (3, 8)
    assert gated_mlp_act(x).shape == (3, 4)
    for act in ACTS:
        for packed in (None, *LAYOUTS):
            choice = resolve_gated_mlp_act(x, act=act, casting="llama", packed=packed)
            assert choice.backend == "eager"


def test_double_runs_on_eager_and_names_what_cannot(backend: str) -> None:
    x = X.double()
    assert gated_mlp_act(x, x).dtype == torch.float64
    with pytest.raises(
        UnsupportedFeature, match=r"takes bfloat16 or float16 or float32, not float64.*'eager'"
    ):
        gated_mlp_act(x, x, implementation=backend)


def test_explain_knows_the_op() -> None:
    text = swathe.explain(OP, act="gpt_oss", packed="interleaved", casting="llama")
    assert "eager" in text and "triton" in text
    assert "serves act=" in swathe.explain(OP, act="mish")
