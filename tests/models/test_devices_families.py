"""Every family and head: spread by "auto" over imitated devices, resized, and estimated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from swathe.kernels.catalog import backends
from swathe.kernels.core.registry import register_backend, registered
from swathe.modeling import devices
from swathe.modeling.auto import HEADS, model_class, model_types
from swathe.modeling.cache import DynamicCache
from swathe.modeling.dispatch import dispatch_model
from swathe.modeling.errors import ConfigError
from swathe.modeling.memory import memory_estimate

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "kernels": "eager",
}
# torch's fake tensors refuse operands on two such devices; see test_dispatch.py
GPUS = [torch.device("lazy", 0), torch.device("lazy", 1)]
CPU = torch.device("cpu")


def found() -> Iterator[tuple[str, str]]:
    for family in model_types():
        for head in HEADS:
            try:
                model_class(family, head)
            except ConfigError:
                continue
            yield family, head


MODELS = list(found())


def build(family: str, head: str) -> Any:
    config = model_class(family, "config")
    known = {k: v for k, v in SIZES.items() if k in config.accepted_keys()}
    return model_class(family, head)(config(**known)).eval()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eager backends of every op serve the devices "lazy"; tensors are fake."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    ours = [registered(op)["eager"] for op in backends() if "eager" in registered(op)]
    for backend in ours:
        able = backend.capabilities
        more = dataclasses.replace(able, devices=able.devices | {"lazy"})
        register_backend(dataclasses.replace(backend, capabilities=more), replace=True)
    try:
        with FakeTensorMode():
            yield
    finally:
        for backend in ours:
            register_backend(backend, replace=True)


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_auto_spreads_every_model(
    family: str, head: str, lazy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, head)
    total = model.get_memory_footprint()
    room = {GPUS[0]: int(total * 0.35), GPUS[1]: int(total * 0.4), CPU: total}
    monkeypatch.setattr(devices, "available_memory", lambda: room)
    dispatch_model(model, "auto")
    assert {p.device for p in model.parameters()} == {*GPUS, CPU}
    ids = torch.ones(2, 7, dtype=torch.long)
    # fake tensors have no values for a look at padding, and none is needed to pool the last token
    options = {"pooling": "hf"} if head == "seq_cls" and family != "bert" else {}
    out = model(ids, output_hidden_states=True, **options)
    assert {t.device for t in (out[0], *out.hidden_states)} == {GPUS[0]} == {model.device}


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_tokens_of_every_model_are_resized(family: str, head: str) -> None:
    model = build(family, head)
    model.resize_token_embeddings(110)
    wide = head in ("causal_lm", "masked_lm")
    assert model.config.vocab_size == 110 and model.get_input_embeddings().num_embeddings == 110
    logits = model(torch.full((2, 7), 109))[0]
    assert not wide or logits.shape == (2, 7, 110)


@pytest.mark.parametrize("family", [f for f, head in MODELS if head == "causal_lm"])
def test_estimates_of_every_decoder(family: str) -> None:
    model = build(family, "causal_lm")
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    pairs = [t for layer in cache._layers for t in (layer.keys, layer.values) if t is not None]
    estimate = memory_estimate(model.config, 2, 7)
    assert estimate.kv_cache == sum(t.nbytes for t in pairs) > 0
    assert estimate.parameters == sum(p.nbytes for p in model.parameters())
