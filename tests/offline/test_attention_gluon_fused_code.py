"""Every configuration of attention's backward in a single pass for Hopper, as it is launched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from support.fake_driver import fake_gpu
from support.gate import covered, verify
from support.gluon_gate import GluonConfiguration, launched, wgmma
from swathe.kernels.attention import _gluon_fused
from swathe.kernels.attention._gluon_blocks import boxes
from swathe.kernels.attention.mask import Mask
from swathe.kernels.attention.op import empty_forward

T, S, H, K = 256, 512, 4, 2
KEYS = QUERIES = 64  # of a warpgroup's products


def call(D: int, E: int, dtype: torch.dtype, given: tuple[str, ...]) -> None:
    """Launch the backward of causal attention with the optional parts that are given."""

    def made(rows: int, count: int, features: int) -> Tensor:
        return torch.zeros(2, rows, count, features, dtype=dtype).transpose(1, 2)

    q, k, v = made(T, H, D), made(S, K, D), made(S, K, E)
    places = torch.zeros(2, T, dtype=torch.int32) if "places" in given else None
    alibi = torch.zeros(H) if "alibi" in given else None
    softcap = 30.0 if "softcap" in given else 0.0
    o, lse = empty_forward(q, k, v)
    bounds = Mask(causal=True).bounds_int32(T, S, q.device)
    _gluon_fused.backward(
        o, lse, q, k, v, o, lse, *bounds, places, None, None, None, None, alibi, None, 0.125,
        softcap, 0.0, False,
    )  # fmt: skip


def configuration(
    D: int, E: int, dtype: torch.dtype = torch.bfloat16, *given: str
) -> GluonConfiguration:
    """k q^T, v do^T and half of ds k over 128 keys from shared memory; p^T do and ds^T q from
    registers, the latter in two halves. Numbers of rows are read where copies put them, ds and dq
    written there.
    """
    half, values = boxes(D)[0] // 2, boxes(E)[0]
    products = [(2 * half, QUERIES, "SS"), (values, QUERIES, "SS"), (2 * KEYS, half, "SS")]
    sums = [(QUERIES, values, "RS"), (QUERIES, half, "RS"), (QUERIES, half, "RS")]
    numbers, ds, dq = QUERIES // 2, KEYS // 16, half // 4
    marks = "".join(f"-{name}" for name in given)
    return GluonConfiguration(
        f"backward_fused-{D}-{E}-{str(dtype).removeprefix('torch.')}{marks}",
        partial(launched, "backward_fused", partial(call, D, E, dtype, given)),
        loops=2,
        matrix=(wgmma(*products, *sums),),
        shared_accesses=numbers + ds + dq,
        copies={"UTMAREDG": 2},
    )


def shipped() -> Iterator[GluonConfiguration]:
    """Every pair of boxes, and every optional part where it is served."""
    for D in (64, 128):
        for E in (16, 32, 64, 128):
            yield configuration(D, E)
    yield configuration(104, 104)
    yield configuration(128, 128, torch.float16)
    for given in (("softcap",), ("alibi",), ("alibi", "places"), ("alibi", "softcap")):
        yield configuration(64, 64, torch.bfloat16, *given)


CONFIGURATIONS = list(shipped())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: GluonConfiguration) -> None:
    verify("attention_gluon_fused", configuration, "sm_90")


def test_baseline_is_whole() -> None:
    assert covered("attention_gluon_fused", CONFIGURATIONS) == []


def test_numbers_of_rows_take_no_shared_memory_to_speak_of() -> None:
    code = launched("backward_rows", partial(call, 128, 128, torch.bfloat16, ()))
    assert code.spilled == 0 and not code.serialised and code.shared < 4096


def test_dq_is_added_up_in_fp32() -> None:
    with fake_gpu("sm_90") as gpu:
        call(128, 128, torch.bfloat16, ())
    rows, fused = gpu.launches
    assert (rows.kernel, fused.kernel) == ("backward_rows", "backward_fused")
    names = _gluon_fused._backward_fused_at.kernel.arg_names
    total = fused.arguments[names.index("dq0")]
    assert total.base.dtype == torch.float32 and total.shape == [2, H, T, 128]
