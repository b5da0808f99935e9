"""Whole models' shapes against published counts, and formulas against hand-made numbers."""

from __future__ import annotations

import pytest

from bench.models import (
    MODELS,
    bytes_free,
    bytes_needed,
    cache_bytes,
    counts,
    shape_of,
    training_flops,
)

# of the published checkpoints, tied weights counted once
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "gemma_2b": 2_506_172_416,
    "gemma3_1b": 999_885_952,
}
TINY = shape_of("llama_1b", tiny=True)


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_the_published_ones(model: str) -> None:
    assert counts(MODELS[model]).parameters == PUBLISHED[model]
    assert counts(shape_of(model, tiny=True)).parameters < 30_000


def test_what_a_token_reads_and_multiplies() -> None:
    of = counts(TINY)
    # q and o, k and v, three of the MLP; the tied head
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert of.multiplied == 2 * layer + 128 * 32
    # the embedding is the head, which is read whole; the rest are norms
    assert of.read == of.parameters == of.multiplied + 5 * 32
    apart = counts({**TINY, "tie_word_embeddings": False})
    assert apart.parameters - apart.read == 128 * 32


def test_training_flops() -> None:
    of = counts(TINY)
    # 10 tokens see 55 pairs of each of 4 heads, of 8 features, in 2 layers
    forward = 2 * of.multiplied * 20 + 2 * (2 * 2 * 55 * 4 * 8) * 2
    assert training_flops(TINY, 2, 10) == 3 * forward


def test_windows_bound_work_and_cache() -> None:
    gemma = {**shape_of("gemma3_1b", tiny=True), "num_hidden_layers": 6}
    assert counts(gemma).windows == (8, 8, 8, 8, 8, None)
    assert cache_bytes(gemma, 3, 20, 2) == 3 * 2 * 2 * 8 * 2 * (5 * 8 + 20)
    full = {**gemma, "model_type": "qwen3"}
    del full["sliding_window"]
    # of 20 tokens, 8 see what a causal mask shows, the others 8
    saved = 5 * (210 - (36 + 12 * 8)) * 4
    difference = training_flops(full, 1, 20) - training_flops(gemma, 1, 20)
    assert difference == 3 * 4 * saved * 8


def test_memory_is_estimated_by_what_a_contender_keeps() -> None:
    asked = (MODELS["llama_1b"], 1, 4096, "bfloat16")
    usual = bytes_needed(*asked, training=True)
    scores = bytes_needed(*asked, training=True, scores=True) - usual
    assert scores == 32 * 4096**2 * 6 * 16
    logits = usual - bytes_needed(*asked, training=True, logits=False)
    assert logits == 4096 * 128_256 * 12
    assert usual > 8 * PUBLISHED["llama_1b"]
    decoding = bytes_needed(*asked, training=False)
    assert 2 * PUBLISHED["llama_1b"] < decoding < 3 * PUBLISHED["llama_1b"]
    one = bytes_needed(*asked, training=False, scores=True) - decoding
    assert one == 32 * 4096**2 * 6
    assert 1 << 28 < bytes_free("cpu") < 1 << 45
