"""Every attention backend is as near to the exact model as eager: three dtypes, two paddings.

The counterpart of transformers' test_eager_matches_sdpa_inference, on every real token and with
gradients. Exact is eager in fp64; a backend may be off by what eager is off in the same dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from support import tiny_bert
from support.families import pair, tokens

MASKS = {
    "none": torch.ones(2, 11, dtype=torch.long),
    "left": torch.tensor([[1] * 11, [0] * 4 + [1] * 7]),
    "right": torch.tensor([[1] * 11, [1] * 7 + [0] * 4]),
}


@cache
def found(which: str, attn: str, dtype: torch.dtype, side: str) -> dict[str, Tensor]:
    """Logits of real tokens and every gradient of a training step, in fp64."""
    mask = MASKS[side]
    if which == "encoder":
        model = tiny_bert.pair("BertForTokenClassification", attn)[1]
    else:
        model = pair("mistral", {"attn": attn}, num_hidden_layers=2, sliding_window=2)[1]
    model = model.to(dtype).train()
    ids = tokens()
    labels = (ids % 2 if which == "encoder" else ids).masked_fill(mask == 0, -100)
    out: Any = model(ids, mask, labels=labels)
    out.loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits[mask.bool()].detach().double(), **grads}


def error(mine: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> float:
    """Of all the tensors as one vector: a gradient that is nearly 0 is rounding in any dtype."""
    off, all_of_it = (
        torch.cat([t.flatten() for t in tensors])
        for tensors in ([mine[n] - exact[n] for n in names], [exact[n] for n in names])
    )
    return (off.norm() / all_of_it.norm()).item()


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "triton"])
@pytest.mark.parametrize("which", ["decoder", "encoder"])
def test_as_near_as_eager(which: str, attn: str, dtype: torch.dtype, side: str) -> None:
    exact = found(which, "eager", torch.float64, side)
    eager, mine = (found(which, name, dtype, side) for name in ("eager", attn))
    assert mine.keys() == exact.keys()
    for names in (["logits"], [name for name in exact if name != "logits"]):
        off, allowed = error(mine, exact, names), error(eager, exact, names)
        # in fp32 the orders of two sums are all the difference
        assert off <= 1.25 * allowed + 2 * torch.finfo(dtype).eps, names[0]
