"""Every family as torch sees it: exported, compiled for training, captured states in autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import tiny_bert
from support.families import FAMILIES, pair, tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)
# a backend's operators are the same ones in every family, and interpreting them takes long
on_backends = pytest.mark.parametrize(
    ("family", "attn"),
    [*((name, "eager") for name in FAMILIES), ("llama", "sdpa"), ("gpt_oss", "triton")],
)
MASK = torch.tensor([[1] * 11, [0] * 3 + [1] * 8])


def small(family: str, attn: str = "eager", layers: int = 2) -> Any:
    return pair(family, {"attn": attn}, num_hidden_layers=layers)[1]


@on_backends
def test_exports(family: str, attn: str) -> None:
    model = small(family, attn)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(), "attention_mask": MASK, "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
    )
    for batch, length in ((2, 11), (3, 7)):
        ids = tokens(batch, length, seed=5)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        found = program.module()(input_ids=ids, attention_mask=mask, use_cache=False)
        expected = model(ids, mask, use_cache=False)
        assert type(found) is type(expected) and list(found) == list(expected)
        real = mask.bool()
        torch.testing.assert_close(found.logits[real], expected.logits[real], **CLOSE)


def test_an_encoder_exports() -> None:
    model = tiny_bert.pair("BertForSequenceClassification")[1]
    program = torch.export.export(model, (tiny_bert.IDS,))
    torch.testing.assert_close(
        program.module()(tiny_bert.IDS).logits, model(tiny_bert.IDS).logits, **CLOSE
    )


def trained(model: Any, run: Any) -> list[Tensor]:
    """The loss of one step and every gradient."""
    model.zero_grad()
    loss = run(tokens(), MASK, labels=tokens().masked_fill(MASK == 0, -100)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@on_backends
def test_compiles_for_training_in_one_graph(family: str, attn: str) -> None:
    model = small(family, attn, layers=1).train()
    expected = trained(model, model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mine, other in zip(trained(model, compiled), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@every_family
def test_captured_states_and_weights_receive_gradients(family: str) -> None:
    model = small(family)
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    captured = (*out.hidden_states, *out.attentions)
    for tensor in captured:
        tensor.retain_grad()
    out.logits.square().sum().backward()
    assert len(captured) == 5 and all(t.grad is not None and bool(t.grad.any()) for t in captured)


@every_family
def test_two_forwards_are_the_same_bits(family: str) -> None:
    model = small(family)
    found = [model(tokens(), MASK, output_hidden_states=True).hidden_states for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
