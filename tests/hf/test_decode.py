"""swathe.generate: transformers' models decoded by our loop, over their own weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import swathe
from support.families import FAMILIES, pair, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_transformers(family: str) -> None:
    theirs, _ = pair(family)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=[98]
    )
    for cache in ("dynamic", "static"):
        found = swathe.generate(
            theirs,
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            cache_implementation=cache,
            eos_token_id=[98],
            pad_token_id=expected[0, -1].item() if (expected == 98).any() else 0,
        )
        new = found[:, 9:] == expected[:, 9 : found.shape[1]]
        ended = (found[:, 9:] == 98).cumsum(1) > 0
        assert bool((new | ended).all())


def test_ours_is_kept_and_follows_the_weights() -> None:
    theirs, _ = pair("llama")
    ids = tokens(1)
    first = swathe.generate(theirs, ids, max_new_tokens=6, eos_token_id=[])
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.lm_head.weight.flip(0))
    changed = swathe.generate(theirs, ids, max_new_tokens=6, eos_token_id=[])
    assert changed[0, ids.shape[1]] == 98 - first[0, ids.shape[1]]
    theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().flip(0))
    assert torch.equal(swathe.generate(theirs, ids, max_new_tokens=6, eos_token_id=[]), first)


def test_the_models_own_special_tokens_end_a_row() -> None:
    theirs, _ = pair("llama")
    ids = tokens(1)
    free = swathe.generate(theirs, ids, max_new_tokens=4, eos_token_id=[])
    theirs.generation_config.eos_token_id = free[0, ids.shape[1]].item()
    assert swathe.generate(theirs, ids, max_new_tokens=4).shape[1] == ids.shape[1] + 1


def test_the_model_is_left_as_it_was() -> None:
    theirs, _ = pair("llama", attention_dropout=0.5)
    theirs.train()
    ids = tokens(1)
    a, b = (swathe.generate(theirs, ids, max_new_tokens=4) for _ in range(2))
    assert torch.equal(a, b) and theirs.training
    assert not any(p.grad is not None for p in theirs.parameters())


def test_ours_goes_with_the_model() -> None:
    theirs, _ = pair("llama")
    swathe.generate(theirs, tokens(1), max_new_tokens=2)
    weight = weakref.ref(theirs.lm_head.weight)
    del theirs
    gc.collect()
    assert weight() is None


def test_our_own_models_too() -> None:
    _, ours = pair("qwen3")
    ids = tokens(1)
    expected = ours.generate(ids, max_new_tokens=3)
    assert torch.equal(swathe.generate(ours, ids, max_new_tokens=3), expected)
