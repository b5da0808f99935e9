"""Decoding in Triton: split keys against eager in fp64, and what no bit may depend on."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.decode_cases import NAN, Case, check, paged
from support.interpreter import sanitized, virtual_tensor
from support.tensors import DEVICE, rows
from swathe.kernels.attention import _triton_decode as decoding
from swathe.kernels.attention.mask import Mask

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


CASES = [
    Case((0, 1, 300), 4, 4, 1, 301, 64, 64, bf16),
    Case((700, 37), 6, 2, 1, 1024, 128, 128, bf16),
    Case((700,), 8, 2, 1, 700, 80, 80, fp16),
    Case((600, 5), 8, 1, 2, 640, 64, 64, bf16),
    Case((530, 5), 3, 1, 5, 1000, 64, 64, fp16),
    Case((530,), 3, 1, 17, 530, 16, 16, bf16),
    Case((1100,), 1, 1, 64, 1100, 64, 64, bf16),
    Case((300,), 4, 1, 17, 600, 128, 128, bf16),
    Case((300, 257), 2, 1, 1, 400, 256, 256, bf16),
    Case((515,), 2, 1, 2, 515, 192, 128, bf16),
    Case((300, 64), 3, 1, 1, 320, 80, 80, fp32),
    Case((313,), 4, 2, 17, 520, 16, 32, fp32),
    Case((300,), 4, 1, 5, 300, 256, 256, fp32),
]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """o and lse, the programs in random order."""
    T, S = q.shape[2], k.shape[2] * (1 if table is None else table.shape[1])
    bounds = mask.bounds_int32(T, S, q.device)
    places = None if mask.places is None else mask.places.int()
    masks = (mask.keys, mask.allowed, mask.bias)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    watched = sanitized(order="random", seed=seed) if DEVICE == "cpu" else nullcontext()
    with watched:
        o, lse2 = decoding.decode(
            q, k, v, *bounds, places, *masks, sinks, alibi, table, scale, softcap or 0.0
        )
    return o, lse2 * math.log(2.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_eager(case: Case) -> None:
    solved(case)


@cache
def solved(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, gold and eager."""
    q, k, v = case.inputs()
    o, lse = run(q, k, v, case.mask)
    return o, *check(o, lse, q, k, v, case.mask)


BASE = Case((290, 40), 4, 2, 2, 304, 32, 32, bf16)
SLOPES = (2.0 ** -torch.arange(1.0, BASE.H + 1)).to(DEVICE)
SINKS = rows(BASE.H, seed=5)
HOLES = rows(2, BASE.S, seed=6) > -1.0
DENSE = rows(2, 1, BASE.T, BASE.S, seed=7) > -0.5
BIAS = rows(1, BASE.H, BASE.T, BASE.S, seed=8).masked_fill(~DENSE[:1], torch.finfo(fp32).min)
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({"window": 100}, {}),
    "window of a few": ({"window": 2}, {}),
    "not causal": ({"causal": False}, {}),
    "chunks": ({"chunk": 128}, {}),
    "start": ({"start": torch.tensor([100, 7], device=DEVICE)}, {}),
    "keys": ({"keys": HOLES}, {}),
    "allowed": ({"allowed": DENSE}, {}),
    "bias": ({"bias": BIAS}, {}),
    "bias in bf16, of one head": ({"bias": rows(2, 1, 1, BASE.S, dtype=bf16, seed=9)}, {}),
    "softcap": ({}, {"softcap": 1.5}),
    "alibi": ({}, {"alibi": SLOPES}),
    "alibi of each sequence": ({}, {"alibi": torch.stack((SLOPES, 3 * SLOPES))}),
    "alibi, without places": ({"places": None, "causal": False}, {"alibi": SLOPES / 8}),
    "sinks": ({}, {"sinks": SINKS + 9}),
    "sinks far above every score": ({}, {"sinks": SINKS + 300}),
    "sinks, one of them off": ({}, {"sinks": SINKS.masked_fill(SINKS > 1, -torch.inf)}),
    "scale below zero": ({}, {"scale": -0.3}),
    "everything": (
        {"window": 270, "keys": HOLES, "allowed": DENSE, "bias": BIAS},
        {"softcap": 3.0, "alibi": SLOPES, "sinks": SINKS},
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    parts, scores = FEATURES[name]
    q, k, v = BASE.inputs()
    mask = replace(BASE.mask, **parts)
    o, lse = run(2 * q, 2 * k, v, mask, **scores)
    check(o, lse, 2 * q, 2 * k, v, mask, **scores)
    of_k, of_v, table = paged(2 * k, v, 16, BASE.lengths)
    if not any(name in parts for name in ("keys", "allowed", "bias")):
        again, lse_again = run(2 * q, of_k, of_v, mask, table=table, **scores)
        assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_rounding_is_that_of_the_contract(dtype: torch.dtype) -> None:
    found = []
    for case in CASES:
        if case.dtype == dtype:
            ours, gold, eager = solved(case)
            # rows of many keys are small, and are to count as much as others
            size = gold.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
            found.append([((x - gold) / size).flatten() for x in (ours, gold.to(dtype), eager)])
    ours, ideal, eager = (torch.cat(x).square().mean().sqrt() for x in zip(*found, strict=True))
    assert ours <= 1.5 * ideal and ours <= 0.75 * eager, (ours / ideal, ours / eager)


def test_a_boolean_mask_is_a_bias_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_AMD", True)
    q, k, v = BASE.inputs()
    for bias in (None, BIAS):
        mask = replace(BASE.mask, allowed=DENSE, bias=bias)
        o, lse = run(q, k, v, mask)
        check(o, lse, q, k, v, mask)


@pytest.mark.parametrize("page", [1, 16, 48, 64, 256])
@pytest.mark.parametrize("T", [1, 9])
def test_pages_change_no_bit(page: int, T: int) -> None:
    case = Case((300, 0, 1), 2, 1, T, 320, 64, 64, bf16)
    q, k, v = case.inputs()
    of_k, of_v, table = paged(k, v, page, case.lengths)
    for mask in (case.mask, replace(case.mask, window=70)):
        o, lse = run(q, k, v, mask)
        again, lse_again = run(q, of_k, of_v, mask, table=table)
        assert o.isfinite().all()
        assert torch.equal(o, again) and torch.equal(lse, lse_again)


def test_pages_that_a_window_left_behind_are_not_read() -> None:
    case = Case((700, 640), 2, 1, 1, 704, 64, 64, bf16)
    q, k, v = case.inputs()
    mask = replace(case.mask, window=100)
    o, lse = run(q, k, v, mask)
    of_k, of_v, table = paged(k, v, 32, case.lengths)
    of_k[table[:, :16].long()] = NAN
    table[:, :16] = 2**31 - 1
    again, lse_again = run(q, of_k, of_v, mask, table=table)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)
    k[:, :, :540], v[:, :, :540] = NAN, NAN
    again, lse_again = run(q, k, v, mask)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("sinks", [None, SINKS[:2]])
@pytest.mark.parametrize("T", [1, 17])
def test_batch_and_capacity_change_no_bit(T: int, sinks: Tensor | None) -> None:
    case = Case((300, 33, 0, 256), 2, 1, T, 320, 16, 16, bf16)
    q, k, v = case.inputs()
    o, lse = run(q, k, v, case.mask, sinks=sinks)
    for b, n in enumerate(case.lengths):
        one = case._replace(lengths=(n,))
        for S in (max(n, 1), 320):
            cut = (q[b : b + 1], k[b : b + 1, :, :S], v[b : b + 1, :, :S])
            alone, lse_alone = run(*cut, one.mask, sinks=sinks, seed=b)
            assert torch.equal(alone[0], o[b]) and torch.equal(lse_alone[0], lse[b])


def test_a_program_of_many_splits_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2300, 900), 2, 1, 1, 4096, 16, 16, bf16)
    q, k, v = case.inputs()
    o, lse = run(q, k, v, case.mask)
    check(o, lse, q, k, v, case.mask)
    for programs in (1, 3, 7):
        monkeypatch.setattr(decoding, "PROGRAMS", 1)
        monkeypatch.setattr(decoding, "multiprocessors", lambda _, n=programs: n)
        again, lse_again = run(q, k, v, case.mask)
        assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("S", [1, 700])
def test_rows_that_see_nothing(S: int) -> None:
    case = Case((0, 1), 2, 1, 3, S, 16, 16, bf16)
    q, k, v = case.inputs()
    o, lse = run(q, k, v, case.mask)
    # of three new tokens in a cache of one key, only the last has a place in it
    assert (o[0] == 0).all() and (o[1, :2] == 0).all() and (o[1, 2] == v[1, 0, 0]).all()
    assert lse.isneginf().sum() == 2 * 5
    o, lse = run(q, k, v, case.mask, sinks=torch.tensor([0.5, -torch.inf], device=DEVICE))
    assert (
        (o[0] == 0).all()
        and torch.allclose(lse[0, 0], torch.tensor(0.5, device=DEVICE))
        and lse[0, 1].isneginf().all()
    )


def test_nothing_to_do() -> None:
    for lengths, T, S in (((), 1, 5), ((3, 2), 0, 5)):
        case = Case(lengths, 2, 1, T, S, 16, 16, bf16)
        o, lse = run(*case.inputs(), Mask())
        assert o.shape == (len(lengths), T, 2, 16) and lse.shape == (len(lengths), 2, T)
    case = Case((0,), 2, 1, 1, 0, 16, 16, bf16)
    o, lse = run(*case.inputs(), case.mask)
    assert (o == 0).all() and lse.isneginf().all()


def test_any_strides() -> None:
    case = Case((290, 40), 4, 2, 3, 300, 32, 32, bf16)
    q, k, v = case.inputs()
    o, lse = run(q, k, v, case.mask)
    both = torch.stack((k, v), 3).contiguous()
    for keys, values in (
        (k.contiguous(), v.contiguous()),
        (both[:, :, :, 0], both[:, :, :, 1]),
        (k.transpose(2, 3).contiguous().transpose(2, 3), v),
    ):
        again, lse_again = run(q.contiguous(), keys, values, case.mask)
        assert torch.equal(o, again) and torch.equal(lse, lse_again)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is not there")
def test_pages_past_two_to_the_31_elements() -> None:
    case = Case((40,), 2, 1, 1, 64, 64, 64, fp16)
    q, k, v = case.inputs()
    pages = 2**31 // (16 * 64) + 3
    of_k, of_v = (virtual_tensor((pages, 1, 16, 64), fp16) for _ in "kv")
    table = torch.tensor([[pages - 1, 0, pages - 3, -1]], dtype=torch.int32)
    for i, page in enumerate(table[0, :3].tolist()):
        of_k[page, 0] = k[0, 0, 16 * i : 16 * i + 16].nan_to_num(0.0)
        of_v[page, 0] = v[0, 0, 16 * i : 16 * i + 16].nan_to_num(0.0)
    o, lse = run(q, k, v, case.mask)
    again, lse_again = run(q, of_k, of_v, case.mask, table=table)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)


@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    K, groups, T = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    S = draw(st.integers(1, 400))
    lengths = tuple(draw(st.lists(st.integers(0, S), min_size=1, max_size=2)))
    D, E = (draw(st.sampled_from([16, 24, 32, 40])) for _ in "DE")
    case = Case(lengths, K * groups, K, T, S, D, E, draw(st.sampled_from([bf16, fp16, fp32])))
    mask = replace(
        case.mask,
        window=draw(st.none() | st.integers(1, S)),
        causal=draw(st.booleans()),
        chunk=draw(st.none() | st.integers(1, S)),
    )
    q, k, v = case.inputs(seed=S)
    softcap = draw(st.none() | st.just(2.0))
    sinks = rows(case.H, seed=S) if draw(st.booleans()) else None
    o, lse = run(q, k, v, mask, softcap=softcap, sinks=sinks)
    check(o, lse, q, k, v, mask, softcap=softcap, sinks=sinks)
    of_k, of_v, table = paged(k, v, draw(st.integers(1, 200)), lengths)
    again, lse_again = run(q, of_k, of_v, mask, table=table, softcap=softcap, sinks=sinks)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)
