"""Dropout of the Triton attention: what stays is a Philox number of seed, head, row and key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from support.tensors import DEVICE
from swathe.kernels.attention.api import Mask, attention

B, H, K, T, S, D = 2, 4, 2, 40, 70, 16
PROBABILITY = 0.3


def inputs(seed: int = 0) -> list[Tensor]:
    """q, k, v and what arrives at o."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, K, S, D), (B, K, S, D), (B, T, H, D))
    return [torch.randn(size, generator=generator).to(DEVICE) for size in sizes]


def philox(seed: int, key: np.ndarray, row: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The first word of Philox4x32-10 (Salmon et al., 2011) for counters (key, row, head, 0)."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    keys = [np.uint64(seed) & low, np.uint64(seed) >> shift]
    c = [np.broadcast_arrays(key, row, head)[i].astype(np.uint64) for i in range(3)]
    c.append(np.zeros_like(c[0]))
    for _ in range(10):
        high_b, high_a = (b * c[2]) >> shift, (a * c[0]) >> shift
        c = [high_b ^ c[1] ^ keys[0], (b * c[2]) & low, high_a ^ c[3] ^ keys[1], (a * c[0]) & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return c[0].astype(np.uint32)


def expected(seed: int) -> Tensor:
    """Which weights (B, H, T, S) stay."""
    key, row = np.arange(S)[None, None], np.arange(T)[None, :, None]
    word = philox(seed, key, row, np.arange(B * H)[:, None, None]).view(np.int32).astype(np.int64)
    uniform = np.where(word < 0, -word - 1, word) / 2**31
    return torch.from_numpy(uniform >= PROBABILITY).view(B, H, T, S).to(DEVICE)


def by_definition(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mask: Mask) -> Tensor:
    """o with those weights."""
    k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    z = (q @ k.transpose(2, 3) * D**-0.5).masked_fill(~mask.visible(T, S, q.device), -torch.inf)
    return (z.softmax(-1) * kept / (1 - PROBABILITY) @ v).transpose(1, 2)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True)], ids=["full", "causal"])
def test_the_weights_that_philox_keeps_and_their_gradients(mask: Mask) -> None:
    *tensors, do = inputs()
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,), device=DEVICE).item())
    kept = expected(seed)
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    exact = [t.double().requires_grad_() for t in tensors]
    gold = by_definition(*exact, kept, mask)
    torch.manual_seed(5)
    leaves = [t.requires_grad_() for t in tensors]
    o = attention(*leaves, mask, dropout=PROBABILITY, implementation="triton")
    torch.testing.assert_close(o.double(), gold, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(o, leaves, do)
    for found, wanted in zip(ours, torch.autograd.grad(gold, exact, do.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_torch_seeds_it_and_calls_differ() -> None:
    q, k, v, _ = inputs(1)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs += [attention(q, k, v, dropout=0.5, implementation="triton") for _ in range(2)]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


def test_it_does_not_depend_on_lengths() -> None:
    q, k, v, _ = inputs(2)
    found = []
    for rows in (T, T - 7):
        torch.manual_seed(3)
        found.append(attention(q[:, :, :rows], k, v, dropout=0.5, implementation="triton"))
    assert torch.equal(found[0][:, : T - 7], found[1])
