"""Decoding on Hopper's matrix units, emulated: against eager in fp64, over random schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.decode_cases import NAN, Case, check, paged
from support.gluon_decoding import run
from support.tensors import DEVICE, rows
from swathe.kernels.attention import _gluon_decode as decoding

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the emulator computes on a CPU")
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case((0, 1, 300), 32, 1, 1, 301, 64, 64, bf16),
    Case((700, 37), 8, 1, 5, 720, 128, 128, bf16),
    Case((600, 5), 6, 2, 9, 640, 64, 64, fp16),
    Case((1100,), 2, 1, 64, 1100, 64, 64, bf16),
    Case((600,), 18, 1, 1, 640, 128, 64, fp16),
    Case((300,), 5, 1, 7, 400, 256, 256, bf16),
    Case((515,), 18, 1, 1, 515, 192, 128, bf16),
    Case((300, 64), 18, 1, 1, 320, 80, 80, fp16),
]
BASE = Case((290, 40), 32, 2, 2, 304, 64, 64, bf16)
SLOPES = (2.0 ** -(torch.arange(1.0, BASE.H + 1) ** 0.3)).to(DEVICE)
SINKS = rows(BASE.H, seed=5)
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({"window": 100}, {}),
    "window of a few": ({"window": 2}, {}),
    "not causal": ({"causal": False}, {}),
    "chunks": ({"chunk": 128}, {}),
    "start": ({"start": torch.tensor([100, 7], device=DEVICE)}, {}),
    "softcap": ({}, {"softcap": 1.5}),
    "alibi": ({}, {"alibi": SLOPES}),
    "alibi of each sequence": ({}, {"alibi": torch.stack((SLOPES, 3 * SLOPES))}),
    "sinks": ({}, {"sinks": SINKS + 9}),
    "sinks, one of them off": ({}, {"sinks": SINKS.masked_fill(SINKS > 1, -torch.inf)}),
    "scale below zero": ({}, {"scale": -0.3}),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_eager(case: Case) -> None:
    q, k, v = case.inputs()
    for seed in range(3):
        o, lse, _ = run(q, k, v, case.mask, seed=seed)
        check(o, lse, q, k, v, case.mask)


def test_rounding_is_that_of_the_contract() -> None:
    found = []
    for case in (c for c in CASES if c.dtype == bf16):
        q, k, v = case.inputs()
        o, lse, _ = run(q, k, v, case.mask)
        gold, eager = check(o, lse, q, k, v, case.mask)
        # rows of many keys are small, and are to count as much as others
        size = gold.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        found.append([((x - gold) / size).flatten() for x in (o, gold.to(bf16), eager)])
    ours, ideal, eager = (torch.cat(x).square().mean().sqrt() for x in zip(*found, strict=True))
    assert ours <= 1.5 * ideal and ours <= 0.75 * eager, (ours / ideal, ours / eager)


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    parts, scores = FEATURES[name]
    q, k, v = BASE.inputs()
    mask = replace(BASE.mask, **parts)
    o, lse, _ = run(2 * q, 2 * k, v, mask, **scores)
    check(o, lse, 2 * q, 2 * k, v, mask, **scores)
    of_k, of_v, table = paged(2 * k, v, 128, BASE.lengths)
    again, lse_again, _ = run(2 * q, of_k, of_v, mask, table=table, seed=1, **scores)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("T", [1, 2])
def test_latent_cache(T: int, page: int | None) -> None:
    """DeepSeek's: 576 features that all heads share, of which 512 are the values too."""
    case = Case((300, 70, 1), 34, 1, T, 320, 576, 512, bf16)
    q, k, _ = case.inputs()
    scale, v, table, of_k = 0.07, k[..., :512], None, k
    if page:
        of_k, _, table = paged(k, v, page, case.lengths)
    latent = of_k[..., :512]
    o, lse, stats = run(q, of_k, latent, case.mask, table=table, scale=scale, seed=T)
    check(o, lse, q, k, v, case.mask, scale=scale)
    assert stats.loaded_bytes <= (5 + 2 + 1) * T * 64 * 576 * 2  # once for each 64 rows


def test_keys_are_read_once_for_all_rows_that_share_them() -> None:
    case = Case((1024,), 32, 1, 2, 1024, 128, 128, bf16)
    stats = run(*case.inputs(), case.mask)[2]
    assert stats.loaded_bytes == 2 * 1024 * 128 * 2
    assert stats.product_flops == 2 * 2 * 64 * 1024 * 128


def test_a_window_is_all_that_is_read() -> None:
    case = Case((1500,), 32, 1, 1, 2048, 64, 64, bf16)
    q, k, v = case.inputs()
    mask = replace(case.mask, window=100)
    k[:, :, :1400], v[:, :, :1400] = NAN, NAN
    o, lse, stats = run(q, k, v, mask)
    check(o, lse, q, k, v, mask)
    assert stats.loaded_bytes <= 2 * 2 * 128 * 64 * 2  # two tiles of keys, two of values


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_a_program_of_many_splits_changes_no_bit(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((2300, 900), 17, 1, 1, 2560, 64, 64, bf16)
    q, k, v = case.inputs()
    o, lse, _ = run(q, k, v, case.mask)
    check(o, lse, q, k, v, case.mask)
    monkeypatch.setattr(decoding, "PROGRAMS", 1)
    monkeypatch.setattr(decoding, "multiprocessors", lambda _: programs)
    again, lse_again, _ = run(q, k, v, case.mask, seed=programs)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("S", [1, 700])
def test_rows_that_see_nothing(S: int) -> None:
    case = Case((0, 1), 8, 1, 3, S, 64, 64, bf16)
    q, k, v = case.inputs()
    o, lse, _ = run(q, k, v, case.mask)
    assert (o[0] == 0).all() and (o[1, :2] == 0).all() and (o[1, 2] == v[1, 0, 0]).all()
    assert lse.isneginf().sum() == 8 * 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": fp32}, "float32"),
        ({"D": 12, "E": 64}, "12 features"),
        ({"D": 64, "E": 512}, "512 features"),
        ({"D": 576, "E": 512}, "in k's own memory"),
    ],
)
def test_what_it_does_not_serve(change: dict[str, Any], reason: str) -> None:
    q, k, v = BASE._replace(**change).inputs()
    assert reason in str(decoding.why_not(q, k, v, None, None, None, None, None))


def test_pages_smaller_than_a_tile_are_not_served() -> None:
    q, k, v = BASE.inputs()
    of_k, of_v, table = paged(k, v, 16, BASE.lengths)
    reason = str(decoding.why_not(q, of_k, of_v, None, None, None, None, table))
    assert "pages of 16 keys" in reason
    strided = torch.empty(2, 2, 304, 65, dtype=bf16)[..., :64]
    assert "strides" in str(decoding.why_not(q, strided, strided, None, None, None, None, None))
