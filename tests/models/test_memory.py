"""What a model takes: estimates beside built models, filled caches and saved tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe
from swathe.modeling.cache import DynamicCache
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from swathe.modeling.figures import bytes_in_words, count_in_words
from swathe.modeling.memory import MemoryEstimate, memory_estimate

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def ids(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_buffers_are_exact(tied: bool, dtype: torch.dtype) -> None:
    config = LlamaConfig(**TINY, tie_word_embeddings=tied)
    model = LlamaForCausalLM.from_config(config, dtype=dtype)
    found = memory_estimate(config, 1, 16, dtype)
    assert found.parameters == sum(p.nbytes for p in model.parameters())
    assert found.parameters + found.buffers == model.get_memory_footprint()
    assert memory_estimate(model, 1, 16).parameters == found.parameters
    assert (found.gradients, found.optimizer) == (0, 0)


def test_dtype_is_the_models_then_the_configurations_then_fp32() -> None:
    elements = build().num_parameters()
    config = LlamaConfig(**TINY)
    assert memory_estimate(config).parameters == 4 * elements
    assert memory_estimate(LlamaConfig(**TINY, dtype="float16")).parameters == 2 * elements
    assert memory_estimate(build().half()).parameters == 2 * elements
    assert memory_estimate(build().half(), dtype="float32").parameters == 4 * elements


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_is_exact(kv_heads: int, dtype: torch.dtype) -> None:
    model = build(num_key_value_heads=kv_heads, head_dim=32).to(dtype)
    cache = DynamicCache()
    with torch.no_grad():
        out = model(ids(), past_key_values=cache)
    pairs = [t for layer in cache._layers for t in (layer.keys, layer.values) if t is not None]
    found = memory_estimate(model, 2, 16)
    assert found.kv_cache == sum(t.nbytes for t in pairs)
    assert found.logits == out.logits.nbytes
    assert memory_estimate(model, 2, 16, logits_to_keep=1).logits == out.logits[:, :1].nbytes


def test_gradients_and_optimizer_are_exact() -> None:
    model = build().to(torch.bfloat16).train()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    found = memory_estimate(model, 2, 16, training=True)
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert found.optimizer == sum(t.nbytes for t in states)
    assert found.kv_cache == 0


def saved_bytes(model: LlamaForCausalLM, inputs: Tensor) -> int:
    """Bytes of the storages that backward will read, parameters, buffers and logits left out."""
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(inputs).logits
    for t in (*model.parameters(), *model.buffers(), logits):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_activations_are_what_the_kernels_keep(kv_heads: int) -> None:
    model = build(kernels="triton", num_key_value_heads=kv_heads).train()
    found = memory_estimate(model, 1, 16, training=True)
    assert found.activations == found.activations_kept
    # angles and row borders are not in the formula, and weigh less the wider the model is
    assert saved_bytes(model, ids(1)) == pytest.approx(found.activations, rel=0.03)
    model.gradient_checkpointing_enable()
    again = memory_estimate(model, 1, 16, training=True)
    assert again.activations == again.activations_recomputed < found.activations
    h, f, e, tokens = 64, 96, 4, 16
    one_layer = ((4 * h + 2 * 64 + 2 * kv_heads * 16 + 3 * f) * e + 4 * 4 + 8) * tokens
    kept = again.activations - one_layer
    assert saved_bytes(model, ids(1)) == pytest.approx(kept, rel=0.1)
    without = memory_estimate(model, 1, 16, training=True, gradient_checkpointing=False)
    assert without.activations == found.activations


def test_logits_in_training() -> None:
    assert memory_estimate(build(), 2, 16, training=True).logits == 2 * 16 * 99 * (2 * 4 + 8)
    fused = build(loss_implementation="triton")
    assert memory_estimate(fused, 2, 16, training=True).logits == 0
    body = LlamaModel(LlamaConfig(**TINY))
    assert memory_estimate(body, 2, 16).logits == 0


def test_nothing_is_allocated_for_a_configuration() -> None:
    found = memory_estimate(LlamaConfig(), 4, 4096, "bfloat16", training=True)
    assert found.parameters == 6738415616 * 2
    assert found.optimizer == 4 * 6738415616 + 4 * 291
    assert swathe.memory_estimate(LlamaConfig(), 4, 4096, "bfloat16", True) == found


def test_it_prints_a_table() -> None:
    found = memory_estimate(LlamaConfig(), 4, 4096, "bfloat16", training=True)
    lines = str(found).split("\n")
    assert lines[0] == ("LlamaForCausalLM, 6.74B parameters, bfloat16, 4 x 4096 tokens, training")
    assert lines[1].split() == ["parameters", "13.5", "GB", "exact"]
    assert any(
        line.split()[:3] == ["total", *bytes_in_words(found.total).split()] for line in lines
    )
    assert "with gradient checkpointing" in lines[-1]
    parts = ("parameters", "buffers", "gradients", "optimizer", "kv_cache", "logits", "activations")
    assert found.total == sum(getattr(found, part) for part in parts)
    inference = str(memory_estimate(LlamaConfig(), 1, 128))
    assert "kv_cache" in inference and "gradients" not in inference
    assert {f.name for f in dataclasses.fields(MemoryEstimate)} >= set(parts)


def test_what_is_refused() -> None:
    for call, error, message in (
        (lambda: memory_estimate(build(), 0), ValueError, "batch_size=0 must be"),
        (lambda: memory_estimate(build(), 1, 1.5), ValueError, "sequence_length=1.5"),  # type: ignore[arg-type]
        (lambda: memory_estimate("llama"), TypeError, "is a str; it must be a configuration"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            call()


def test_footprint_and_counts_are_transformers_own() -> None:
    for tied in (False, True):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
        )
        model = build(tie_word_embeddings=tied)
        assert model.get_memory_footprint(False) == theirs.get_memory_footprint(False)
        for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
            assert model.num_parameters(**options) == theirs.num_parameters(**options)


@pytest.mark.parametrize(
    ("number", "counted", "stored"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.00K", "1.00 kB"),
        (134_515_008, "134.5M", "134.5 MB"),
        (999_960, "1.00M", "1.00 MB"),
        (6_738_415_616, "6.74B", "6.74 GB"),
        (10**13, "10.0T", "10.0 TB"),
    ],
)
def test_figures(number: int, counted: str, stored: str) -> None:
    assert (count_in_words(number), bytes_in_words(number)) == (counted, stored)
