"""Logits that are not computed until somebody reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.tiny_causal import V
from swathe.modeling.hf.patching.causal_loss import CausalLMLoss
from swathe.modeling.hf.patching.lazy_logits import LazyLogits


def lazy() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, V), torch.randn(2, 5, 8, requires_grad=True)
    return LazyLogits(hidden, head), head(hidden)


def test_lazy_logits_record_scale_and_softcap() -> None:
    x, _ = lazy()
    assert x.scale_and_softcap() == (1.0, None)
    assert (x / 4 * 2).float().scale_and_softcap() == (0.5, None)
    capped: Any = torch.tanh(2 * x / 8) * 8
    assert capped.scale_and_softcap() == (2.0, 8.0)
    assert (capped / 2).scale_and_softcap() == (1.0, 4.0)
    assert capped.tanh().scale_and_softcap() is None
    negative: Any = torch.tanh(x) * -1
    assert negative.scale_and_softcap() is None
    kept = x[:, -2:]
    assert isinstance(kept, LazyLogits) and kept.shape == (2, 2, V)
    assert isinstance(x[:, 1:, :], LazyLogits) and x.contiguous() is x and x.to(x.device) is x
    assert x.tensor is None


def test_lazy_logits_are_the_logits() -> None:
    x, real = lazy()
    capped: Any = torch.tanh(x / 3) * 3
    assert torch.equal(capped.float().real(), (torch.tanh(real / 3) * 3).float())
    uses: list[Any] = [
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: -t,
        lambda t: t > 0,
        lambda t: t / torch.tensor(2.0),
        lambda t: t * 0.5 / torch.ones(()),
        lambda t: t[..., :7],
        lambda t: t[:, [0, 2]],
        lambda t: torch.cat([t, t]),
        lambda t: torch.where(t > 0, t, 0.0),
        lambda t: t.argmax(-1),
        lambda t: torch.ones(V) @ t.mT,
        lambda t: t.to(torch.bfloat16),
        lambda t: nn.functional.cross_entropy(t.view(-1, V), torch.arange(10)),
        lambda t: len(t),
        lambda t: t.size(-1),
    ]
    for use in uses:
        fresh, real = lazy()
        found, expected = use(fresh), use(real)
        if not isinstance(expected, Tensor):
            assert found == expected
            continue
        assert type(found) is Tensor and torch.equal(found, expected) and not fresh.steps


def test_lazy_logits_that_were_written_to_stay_so() -> None:
    x, real = lazy()
    x[..., 3] = -1e9
    real[..., 3] = -1e9
    labels = torch.zeros(2, 5, dtype=torch.long)
    loss = CausalLMLoss("eager", lazy=True)(x, labels, V)
    expected = CausalLMLoss("eager", lazy=False)(real, labels, V)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(torch.tanh(x / 2), torch.tanh(real / 2))


def test_lazy_logits_keep_their_graph_when_read_without_one() -> None:
    x, _ = lazy()
    with torch.no_grad():
        assert x.argmax(-1).shape == (2, 5)
    assert x.real().requires_grad
