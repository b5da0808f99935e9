"""The load-balancing loss beside transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from swathe.modeling.router_loss import load_balancing_loss

EXPERTS = 6
MASKS = {
    "none": None,
    "all": torch.ones(2, 5, dtype=torch.int64),
    "some": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "bool": torch.tensor([[False, True, True, True, True], [True, False, True, True, True]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_loss_is_theirs(mask: str, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randn(10, EXPERTS, generator=generator).to(dtype) for _ in range(3)]
    ours = [one.clone().requires_grad_() for one in logits]
    theirs = tuple(one.clone().requires_grad_() for one in logits)
    found = load_balancing_loss(ours, top_k, MASKS[mask])
    expected = load_balancing_loss_func(theirs, EXPERTS, top_k, MASKS[mask])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_loss_at_its_ends() -> None:
    balanced = torch.eye(4).repeat(3, 1) * 1e-3
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1.0)
    collapsed = F.one_hot(torch.zeros(8, dtype=torch.int64), 4) * 50.0
    assert load_balancing_loss([collapsed], 1).item() == pytest.approx(4.0)
    assert load_balancing_loss([collapsed], 1, torch.zeros(2, 4)).item() == 0.0
    assert load_balancing_loss([collapsed[:0]], 1).item() == 0.0


@pytest.mark.parametrize(
    ("logits", "top_k", "mask", "message"),
    [
        ([], 1, None, "router_logits is empty"),
        ([torch.ones(2, 3), torch.ones(3, 3)], 1, None, r"router_logits\[1\] is \(3, 3\)"),
        ([torch.ones(1, 2, 3)], 1, None, r"router_logits\[0\] is \(1, 2, 3\)"),
        ([torch.ones(2, 3)], 4, None, "top_k=4; it must be from 1 to 3"),
        ([torch.ones(2, 3)], 1, torch.ones(1, 3), r"attention_mask is \(1, 3\) for 2 tokens"),
        ([torch.ones(2, 3)], 1, torch.ones(2), r"attention_mask is \(2,\) for 2 tokens"),
    ],
)
def test_loss_refuses(logits: Any, top_k: int, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(logits, top_k, mask)
