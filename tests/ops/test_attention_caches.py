"""Attention over packed documents and caches: cu_seqlens, seq_lens and block_table by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe
from support.tensors import DEVICE
from swathe.kernels.attention.api import Mask, attention

BACKENDS = ("eager", "sdpa", "triton", "cpp")
B, H, K, T, S, D = 3, 4, 2, 3, 24, 16
LENGTHS = torch.tensor([24, 3, 11], device=DEVICE)
PAGE = 4


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return randn(B, H, T, D), randn(B, K, S, D, seed=1), randn(B, K, S, D, seed=2)


def pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k and v cut into pages that lie anywhere, and the table that finds them."""
    count = S // PAGE
    order = torch.randperm(B * count, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    table = order.view(B, count)
    caches = []
    for t in (k, v):
        cache = torch.empty(B * count, K, PAGE, D, device=DEVICE)
        cut = t.reshape(B, K, count, PAGE, D).transpose(1, 2)
        cache[table.flatten()] = cut.reshape(-1, K, PAGE, D)
        caches.append(cache)
    return caches[0], caches[1], table.int()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
def test_rows_are_the_last_of_their_own_length(backend: str, window: int | None) -> None:
    q, k, v = inputs()
    mask = Mask(causal=True, window=window)
    found = attention(q, k, v, mask, seq_lens=LENGTHS, implementation=backend)
    for b, length in enumerate(LENGTHS.tolist()):
        own = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        close(found[b : b + 1], attention(*own, mask, implementation="eager"))


@pytest.mark.parametrize("backend", ["eager", "triton", "cpp"])
def test_pages_are_the_cache_they_were_cut_from(backend: str) -> None:
    q, k, v = inputs()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], device=DEVICE)
    given: dict[str, Any] = {"causal": True, "seq_lens": LENGTHS, "alibi": slopes}
    whole = attention(q, k, v, implementation=backend, **given)
    *caches, table = pages(k, v)
    found = attention(q, *caches, block_table=table, implementation=backend, **given)
    assert torch.equal(found, whole)
    # pages past the last one used may be called anything
    table[1, 1:] = -1
    assert torch.equal(
        attention(q, *caches, block_table=table, implementation=backend, **given)[1], whole[1]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_with_borders_of_their_own(backend: str) -> None:
    q, k, v = randn(1, H, 9, D), randn(1, K, 14, D, seed=1), randn(1, K, 14, D, seed=2)
    rows, keys = (torch.tensor(n, device=DEVICE) for n in ([0, 2, 5, 9], [0, 6, 9, 14]))
    given: dict[str, Any] = {"causal": True, "cu_seqlens": (rows, keys)}
    found = attention(q, k, v, implementation=backend, **given)
    for (a, b), (c, d) in zip(
        zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True),
        zip(keys[:-1].tolist(), keys[1:].tolist(), strict=True),
        strict=True,
    ):
        own = (q[:, :, a:b], k[:, :, c:d], v[:, :, c:d])
        close(found[:, a:b], attention(*own, causal=True, implementation="eager"))
    same = attention(
        q, k[:, :, :9], v[:, :, :9], causal=True, cu_seqlens=rows, implementation=backend
    )
    pair = attention(
        q, k[:, :, :9], v[:, :, :9], causal=True, cu_seqlens=(rows, rows), implementation=backend
    )
    assert torch.equal(same, pair)


q0, k0, v0 = inputs()
kp, vp, table0 = pages(k0, v0)
borders = torch.tensor([0, 3], device=DEVICE)
REFUSALS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "lengths of another batch": (
        ValueError,
        r"seq_lens is \(2,\).*it must be \(3,\)",
        lambda: attention(q0, k0, v0, seq_lens=LENGTHS[:2]),
    ),
    "lengths that are no numbers": (
        TypeError,
        "seq_lens is torch.float32; it must hold whole numbers",
        lambda: attention(q0, k0, v0, seq_lens=LENGTHS.float()),
    ),
    "pages without lengths": (
        ValueError,
        r"block_table is \(3, 6\) without seq_lens; pass seq_lens \(3,\)",
        lambda: attention(q0, kp, vp, block_table=table0),
    ),
    "a table of another batch": (
        ValueError,
        r"block_table is \(2, 6\)",
        lambda: attention(q0, kp, vp, seq_lens=LENGTHS, block_table=table0[:2]),
    ),
    "borders in a batch": (
        ValueError,
        "packs documents into one row, but q has 3 rows",
        lambda: attention(q0, k0, v0, cu_seqlens=borders),
    ),
    "one set of borders for two lengths": (
        ValueError,
        r"q has 3 rows and k 24, cu_seqlens is \(2,\) and that of the keys None",
        lambda: attention(q0[:1], k0[:1], v0[:1], cu_seqlens=borders),
    ),
    "said twice": (
        ValueError,
        "by the mask or by cu_seqlens and seq_lens, not by both",
        lambda: attention(q0, k0, v0, Mask(end=LENGTHS), seq_lens=LENGTHS),
    ),
    "a gradient for pages": (
        ValueError,
        r"block_table\) has no gradient; call it under torch.no_grad",
        lambda: attention(
            q0.clone().requires_grad_(),
            kp,
            vp,
            seq_lens=LENGTHS,
            block_table=table0,
            implementation="triton",
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    error, message, call = REFUSALS[name]
    with pytest.raises(error, match=message):
        call()


def _outside() -> Tensor:
    table = table0.clone()
    table[1, 0] = 99
    return table


VALUES: dict[str, tuple[str, Callable[[], object]]] = {
    "more keys than the cache holds": (
        "seq_lens goes from 3 to 25, but the cache has room for 24 keys",
        lambda: attention(q0, k0, v0, seq_lens=LENGTHS + torch.tensor([1, 0, 0], device=DEVICE)),
    ),
    "a page outside": (
        r"block_table\[1, 0\] is 99, but the cache has pages 0 to 17 and sequence 1 uses 1",
        lambda: attention(q0, kp, vp, seq_lens=LENGTHS, block_table=_outside()),
    ),
    "borders that fall": (
        r"cu_seqlens is \[0, 3, 2\]; it must start at 0, never fall",
        lambda: attention(
            q0[:1], k0[:1, :, :3], v0[:1, :, :3], cu_seqlens=torch.tensor([0, 3, 2], device=DEVICE)
        ),
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_debug_looks_at_values(name: str) -> None:
    message, call = VALUES[name]
    with swathe.debug(), pytest.raises(ValueError, match=message):
        call()
