"""What keeps a step of generate out of a graph, and that the double of graphs would notice it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support import graphs as double
from support.families import pair
from support.graphs import drawn
from swathe.modeling.generation.step import DecodeStep


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[double.Graph]:
    return double.install(monkeypatch)


@pytest.fixture
def model() -> Any:
    return pair("llama", "eager", num_hidden_layers=1)[1]


Take = Callable[[DecodeStep, Tensor], None]
_take = DecodeStep.take


def _asks(self: DecodeStep, logits: Tensor) -> None:
    _take(self, logits * self.column.item())


def _brings_a_number(self: DecodeStep, logits: Tensor) -> None:
    _take(self, logits + torch.tensor(0.0))


def _draws_elsewhere(self: DecodeStep, logits: Tensor) -> None:
    _take(self, logits + 0 * torch.rand(logits.shape, generator=torch.Generator()))


def _chooses_rows(self: DecodeStep, logits: Tensor) -> None:
    _take(self, logits[torch.ones(logits.shape[0], dtype=torch.bool)])


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (_asks, "_local_scalar_dense.* asks the device"),
        (_brings_a_number, "number of the host's"),
        (_draws_elsewhere, "generator that the graph does not know"),
        (_chooses_rows, "index.* asks the device"),
    ],
)
def test_steps_that_a_gpu_would_refuse(
    take: Take, message: str, model: Any, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeStep, "take", take)
    with pytest.raises(double.Refused, match=message) as caught:
        drawn(model, cuda_graph=True)
    assert "cuda_graph=False needs no capture" in str(caught.value.__notes__)


def _counts_on_the_host(self: DecodeStep, logits: Tensor) -> None:
    self.at = getattr(self, "at", 6) + 1  # type: ignore[attr-defined]
    _take(self, logits)
    self.sequences[:, self.at] = self.token[:, 0]  # type: ignore[attr-defined]


def _makes_a_buffer_anew(self: DecodeStep, logits: Tensor) -> None:
    _take(self, logits)
    self.token = self.token.clone()


def test_a_number_of_the_hosts_gives_wrong_tokens(
    model: Any, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(model, cuda_graph=False)
    monkeypatch.setattr(DecodeStep, "take", _counts_on_the_host)
    assert not torch.equal(drawn(model, cuda_graph=True), expected)


def test_a_buffer_made_anew_leaves_the_graph_without(
    model: Any, made: list[double.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeStep, "take", _makes_a_buffer_anew)
    with pytest.raises(double.Refused, match="memory that was freed"):
        drawn(model, cuda_graph=True)


def test_what_stands_in_the_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, model: Any = model, **options: Any) -> None:
        with pytest.raises(ValueError, match=rf"(?s)^cuda_graph=.*{message}"):
            drawn(model, **{"cuda_graph": True, "max_new_tokens": 2, **options})

    auto = drawn(model, max_new_tokens=2)
    assert torch.equal(auto, drawn(model, max_new_tokens=2, cuda_graph=False))
    refused(r"the model is on cpu, and only \('cuda',\) have graphs; or pass .*auto")
    refused("; allowed: 'auto', True, False", cuda_graph="always")
    made = double.install(monkeypatch)
    refused("cache_implementation=None is .* pass 'static'", cache_implementation=None)
    refused("cache_implementation='dynamic' is no cache of fixed", cache_implementation="dynamic")
    refused(r"mode; call model.eval\(\)", model.train())
    model.eval()
    with torch.autocast("cpu"):
        refused("casts weights anew in each call")
    _, experts = pair("mixtral", None, num_hidden_layers=1)
    refused(r"model.layers.0.mlp.experts asks the device .* needs bfloat16 weights", experts)
    assert not made
    drawn(experts, max_new_tokens=2)
    drawn(model, max_new_tokens=2, cache_implementation=None)
    drawn(model, max_new_tokens=1)  # which needs no step
    assert not made, "auto"
    drawn(model, max_new_tokens=2)
    assert len(made) == 1, "auto"
