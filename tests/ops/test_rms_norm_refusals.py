"""What rms_norm refuses, and what each message says; choices and missing backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import swathe
from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.kernels.core.registry import (
    Backend,
    register_backend,
    registered,
    resolve,
    unregister_backend,
)
from swathe.kernels.core.spec import ANY, FLOATS, Capabilities, Spec
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import resolve_rms_norm, rms_norm

X, W = torch.ones(2, 8), torch.ones(8)
Call = Callable[[], object]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "a scalar": (
        lambda: rms_norm(torch.tensor(1.0), torch.ones(1)),
        ValueError,
        "at least one dimension",
    ),
    "no features": (
        lambda: rms_norm(torch.ones(2, 0), torch.ones(0)),
        ValueError,
        "one or more features",
    ),
    "weight size": (lambda: rms_norm(X, torch.ones(4)), ValueError, r"weight is \(4,\).*\(8,\)"),
    "weight device": (
        lambda: rms_norm(X, torch.ones(8, device="meta")),
        ValueError,
        "on meta.*on cpu",
    ),
    "integers": (lambda: rms_norm(X.int(), W), TypeError, "torch.int32"),
    "residual shape": (
        lambda: rms_norm(X, W, residual=torch.ones(8)),
        ValueError,
        r"residual is \(8,\)",
    ),
    "residual dtype": (lambda: rms_norm(X, W, residual=X.int()), TypeError, "residual is"),
    "casting": (lambda: rms_norm(X, W, casting="lama"), ValueError, "did you mean 'llama'"),
    "eps": (lambda: rms_norm(X, W, eps=-1.0), ValueError, "eps=-1.0"),
    "nan eps": (lambda: rms_norm(X, W, eps=float("nan")), ValueError, "eps=nan"),
    "backend name": (
        lambda: rms_norm(X, W, implementation="trion"),
        ValueError,
        "did you mean 'triton'",
    ),
    "torch with llama's rounding": (
        lambda: rms_norm(X, W, implementation="torch"),
        UnsupportedFeature,
        "serves casting='fp32', not 'llama'",
    ),
    "op": (lambda: swathe.explain("rmsnorm"), ValueError, "no op is called 'rmsnorm'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_choice_on_another_device_is_refused() -> None:
    choice = replace(resolve_rms_norm(X, W, "eager"), backend="far", devices=frozenset({"cuda"}))
    with pytest.raises(ValueError, match=r"the input is on cpu.*chosen for \['cuda'\]"):
        rms_norm(X, W, implementation=choice)


@pytest.fixture
def no_cpp() -> Iterator[None]:
    real = registered("rms_norm")["cpp"]
    register_backend(replace(real, missing=lambda: "csrc was not compiled"), replace=True)
    yield
    register_backend(real, replace=True)


@pytest.mark.usefixtures("no_cpp")
def test_missing_backend_says_why_and_auto_goes_on() -> None:
    with pytest.raises(BackendUnavailable, match=r"csrc was not compiled.*'eager'"):
        rms_norm(X, W, implementation="cpp")
    choice = resolve_rms_norm(X, W, casting="fp32")
    assert choice.backend == "torch" and choice.skipped == {"cpp": ("csrc was not compiled",)}
    assert resolve_rms_norm(X, W, casting="llama").backend == "eager"
    assert "csrc was not compiled" in swathe.explain("rms_norm", casting="llama")


def test_meta_tensors_take_the_definition() -> None:
    y = swathe.rms_norm(torch.empty(3, 8, device="meta"), torch.empty(8, device="meta"))
    assert y.shape == (3, 8) and y.device.type == "meta"


def mine(served: Capabilities | None = None) -> Backend:
    def load() -> Callable[..., object]:
        return eager.rms_norm

    everything = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=FLOATS,
        features={"casting": ANY, "offset": ANY, "residual": ANY, "weight_dtype": ANY},
    )
    return Backend("rms_norm", "mine", load, served or everything)


@pytest.fixture
def third_party() -> Iterator[None]:
    register_backend(mine())
    yield
    unregister_backend("rms_norm", "mine")


@pytest.mark.usefixtures("third_party")
def test_third_party_backend_is_used_by_name_only() -> None:
    assert torch.equal(
        rms_norm(X, W, implementation="mine"), rms_norm(X, W, implementation="eager")
    )
    assert resolve_rms_norm(X, W).backend != "mine"
    assert "mine" in swathe.backends("rms_norm")["rms_norm"]
    with pytest.raises(ValueError, match="registered already"):
        register_backend(mine())


def test_names_that_cannot_be_registered_or_removed() -> None:
    with pytest.raises(ValueError, match="'auto' is reserved"):
        register_backend(replace(mine(), name="auto"))
    with pytest.raises(ValueError, match="has no backend 'absent'"):
        unregister_backend("rms_norm", "absent")


REASONS = {
    "needs sm_80 or later, not sm_75": {"device": "cuda", "arch": 75},
    "takes float32, not bfloat16": {"dtype": torch.bfloat16},
    "has no backward": {"grad": True},
    "takes sizes up to 64, not 65": {"size": 65},
    "does not serve window=4": {"features": (("window", 4),)},
    "serves shape='round', not 'square'": {"features": (("shape", "square"),)},
    "runs on 'cpu' or 'cuda', not on meta": {"device": "meta"},
}


@pytest.mark.parametrize("reason", REASONS)
def test_every_fact_of_a_record_is_checked(reason: str) -> None:
    record = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32}),
        features={"shape": frozenset({"round"})},
        backward=False,
        min_arch=80,
        max_size=64,
    )
    fine = Spec("rms_norm", "cpu", torch.float32, 64, features=(("shape", "round"),))
    assert record.reasons(fine) == []
    assert record.reasons(replace(fine, **REASONS[reason])) == [reason]


def test_auto_without_a_serving_backend_lists_every_reason() -> None:
    with pytest.raises(UnsupportedFeature, match=r"no backend serves.*eager.*torch\.int8|int8"):
        resolve(Spec("rms_norm", "cpu", torch.int8, 8))
