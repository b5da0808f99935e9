"""verify names the patched modules that no kernel served."""

from __future__ import annotations

import cProfile
import json
from typing import Any

import pytest
import torch
from torch import nn

import swathe
from support.hf_around import BACKENDS, fully, training
from support.hf_patching import state
from support.hf_zoo import build
from support.hf_zoo_coverage import ZOO
from support.tiny_causal import batch, tiny
from swathe.modeling.hf.patching.patch import patch
from swathe.modeling.hf.usage import observed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_everything_is_used_in_a_training_step(model_type: str, backend: str) -> None:
    model = training(model_type)
    fully(model, backend)
    with observed() as usage:
        model(**batch(), use_cache=False)
    assert usage.unused(model) == ()


def test_a_sum_of_positions_is_not_joined() -> None:
    """bert adds positions (1, T) to words (B, T): a sum that the kernel does not take."""
    model = build(ZOO["causal"]["bert"]).bfloat16()
    assert "bert.embeddings" in {row.path for row in patch(model, cross_entropy=True).patched}
    inputs = {**batch(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    found = swathe.verify(model, inputs)
    assert found.unused == ("bert.embeddings (residual_norm)",)
    assert json.loads(found.to_json())["unused"] == list(found.unused)
    assert str(found).endswith(
        "patched, yet served by no kernel of swathe on this batch: bert.embeddings (residual_norm)"
    )
    assert found.failures == ()  # it is no failure


def test_hooks_send_a_module_to_its_own_forward() -> None:
    model = tiny("llama")
    patch(model, backend="cpp")
    own = state(model)
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    found = swathe.verify(model, batch())
    # the sum before the norm is formed; the norm runs its kernel, the layer none
    assert found.unused == (
        "model.layers.0 (residual_norm)",
        "model.layers.1.mlp (gated_mlp_act)",
    )
    assert state(model).keys() == own.keys()


def test_a_loss_that_is_not_asked_for() -> None:
    model = tiny("llama")
    patch(model, cross_entropy=True)
    with observed() as usage:
        model(batch()["input_ids"])
    assert usage.unused(model) == ("the model (cross_entropy)",)


def test_many_are_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen = tiny("llama"), tiny("llama")

        def forward(self, **inputs: Any) -> Any:
            return self.seen(**inputs)

    model = Twice()
    patch(model, backend="cpp")
    found = swathe.verify(model, batch())
    assert len(found.unused) == 12 and all(name.startswith("unseen") for name in found.unused)
    assert str(found).endswith(" and 7 more")


def test_where_calls_cannot_be_seen_nothing_is_said() -> None:
    model = tiny("llama")
    patch(model)
    profile = cProfile.Profile()
    try:
        profile.enable()
        with observed() as usage:
            model(batch()["input_ids"])
    finally:
        profile.disable()
    assert usage.unused(model) == () and not usage.served
    assert profile.getstats()
