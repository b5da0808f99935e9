"""A decoder's caches: steps equal the whole, an encoder is projected once, rows move together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swathe
from support.dummy_bert import BACKENDS, CROSSED, KINDS, LOOSE, RIGHT, SEEN, STATES, S, dummy
from support.tiny_bert import CLOSE, IDS, TINY, B, T
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cross_cache import EncoderDecoderCache
from swathe.modeling.examples.dummy_bert import DummyBertConfig

ENCODER = {"encoder_hidden_states": STATES, "encoder_attention_mask": SEEN}
STEPS = ((0, 5), (5, 6), (6, 7), (7, T))
SIZES = DummyBertConfig(**TINY)
# triton is slow where it is interpreted, and takes the terms of both relative kinds alike
CASES = [(kind, attn) for kind in KINDS for attn in BACKENDS]
CASES.remove(("relative_key", "triton"))


def decoder(attn: str = "eager", kind: str = "absolute", **changes: Any) -> Any:
    return dummy("Model", attn, **{**CROSSED, "position_embedding_type": kind, **changes})


def in_steps(model: Any, cache: Any, mask: Tensor | None = None, **encoder: Any) -> Tensor:
    """Hidden states of IDS, a few tokens at a time, each seeing the mask up to itself."""
    found = []
    for start, end in STEPS:
        seen = None if mask is None else mask[:, :end]
        out = model(IDS[:, start:end], attention_mask=seen, past_key_values=cache, **encoder)
        assert cache is None or out.past_key_values is cache
        cache = out.past_key_values
        found.append(out.last_hidden_state)
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "attn"), CASES)
def test_steps_equal_the_whole(kind: str, attn: str) -> None:
    model = decoder(attn, kind, num_hidden_layers=1 if attn == "triton" else 2)
    whole = model(IDS, use_cache=False, **ENCODER).last_hidden_state
    caches = {
        "made by the model": None,
        "static": EncoderDecoderCache(StaticCache(SIZES, 24), DynamicCache()),
    }
    if attn != "triton":
        caches["both grow"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        caches["of its own tokens only"] = DynamicCache()
    for name, cache in caches.items():
        found = in_steps(model, cache, **ENCODER)
        torch.testing.assert_close(found, whole, **LOOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(whole, model(IDS, use_cache=False).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "attn"), CASES)
def test_steps_without_an_encoder(kind: str, attn: str) -> None:
    model = decoder(attn, kind, add_cross_attention=False)
    mask = RIGHT.flip(1)
    whole = model(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    found = in_steps(model, DynamicCache(), mask)
    torch.testing.assert_close(found * mask[..., None], whole * mask[..., None], **LOOSE)
    assert isinstance(model(IDS).past_key_values, DynamicCache)
    assert model(IDS, use_cache=False).past_key_values is None
    assert model.train()(IDS).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_keeps_no_padding(kind: str) -> None:
    """Positions count real tokens there, so that a padded row equals itself alone."""
    model = decoder("eager", kind)
    mask = RIGHT.flip(1)
    cache = EncoderDecoderCache(StaticCache(SIZES, 24), DynamicCache())
    found = in_steps(model, cache, mask, **ENCODER)
    for row in range(B):
        begin = T - int(mask[row].sum())
        one = {name: given[row : row + 1] for name, given in ENCODER.items()}
        alone = model(IDS[row : row + 1, begin:], **one).last_hidden_state
        torch.testing.assert_close(found[row : row + 1, begin:], alone, **LOOSE)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_an_encoder_is_read_once(attn: str) -> None:
    model = decoder(attn)
    calls: list[int] = []
    for i, layer in enumerate(model.encoder.layer):
        layer.crossattention.self.key.register_forward_hook(lambda *_, i=i: calls.append(i))
    first = model(IDS[:, :5], **ENCODER)
    cache = first.past_key_values
    assert isinstance(cache, EncoderDecoderCache) and cache.is_updated == {0: True, 1: True}
    assert cache.get_seq_length() == 5 and cache.cross_attention_cache.get_seq_length() == S
    # the states may be left out then, their mask may not
    more = model(IDS[:, 5:], past_key_values=cache, encoder_attention_mask=SEEN)
    assert calls == [0, 1] and cache.get_seq_length() == T
    whole = model(IDS, use_cache=False, **ENCODER).last_hidden_state
    torch.testing.assert_close(more.last_hidden_state, whole[:, 5:], **LOOSE)
    again = EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)
    assert again.is_updated == {0: True, 1: True}
    found = model(IDS, past_key_values=again, encoder_attention_mask=SEEN).last_hidden_state
    torch.testing.assert_close(found, whole, **LOOSE)
    assert len(calls) == 4


def test_gradients_pass_through_both_caches() -> None:
    model = decoder("eager", "relative_key_query").train()
    gradients = []
    for cached in (False, True):
        model.zero_grad()
        states = STATES.clone().requires_grad_()
        given = {**ENCODER, "encoder_hidden_states": states}
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        found = in_steps(model, both, **given) if cached else model(IDS, **given)[0]
        found.square().mean().backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append([states.grad, *trained])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
def test_the_estimate_of_a_decoders_cache() -> None:
    model = decoder(add_cross_attention=False)
    cache = DynamicCache()
    model(IDS, past_key_values=cache)
    pairs = [t for layer in cache._layers for t in (layer.keys, layer.values) if t is not None]
    assert swathe.memory_estimate(model, B, T).kv_cache == sum(t.nbytes for t in pairs) > 0
    assert swathe.memory_estimate(dummy(), B, T).kv_cache == 0


@torch.no_grad()
def test_rows_of_both_caches_move_together() -> None:
    model = decoder()
    order = torch.tensor([2, 0, 0])
    whole = model(IDS[order], use_cache=False, **{n: t[order] for n, t in ENCODER.items()})[0]

    def after(change: str, *arguments: Any) -> Tensor:
        cache = model(IDS[:, :5], **ENCODER).past_key_values
        getattr(cache, change)(*arguments)
        given = {"past_key_values": cache, "encoder_attention_mask": SEEN[order]}
        return model(IDS[order, 5:], **given).last_hidden_state

    for change in ("reorder_cache", "batch_select_indices"):
        torch.testing.assert_close(after(change, order), whole[:, 5:], **CLOSE)
    cache = model(IDS[:, :5], **ENCODER).past_key_values
    cache.batch_repeat_interleave(2)
    twice = torch.arange(B).repeat_interleave(2)
    given = {"past_key_values": cache, "encoder_attention_mask": SEEN[twice]}
    found = model(IDS[twice, 5:], **given).last_hidden_state
    expected = model(IDS, use_cache=False, **ENCODER).last_hidden_state
    torch.testing.assert_close(found, expected[twice, 5:], **CLOSE)


@torch.no_grad()
def test_crop_and_reset() -> None:
    model = decoder()
    whole = model(IDS, use_cache=False, **ENCODER).last_hidden_state
    for own in (DynamicCache(), StaticCache(SIZES, 24)):
        cache = EncoderDecoderCache(own, DynamicCache())
        assert cache.is_compileable is own.is_compileable
        model(IDS.flip(1), past_key_values=cache, **ENCODER)
        cache.reset()
        assert cache.get_seq_length() == 0 and not any(cache.is_updated.values())
        other = {"encoder_hidden_states": STATES.flip(1), "encoder_attention_mask": SEEN}
        model(IDS.flip(1), past_key_values=cache, **other)
        cache.reset()
        model(torch.cat((IDS[:, :6], IDS[:, :3]), 1), past_key_values=cache, **ENCODER)
        cache.crop(-3)
        assert cache.get_seq_length() == 6
        assert cache.get_max_length() == own.get_max_length()
        assert cache.get_mask_sizes(2) == own.get_mask_sizes(2)
        found = model(IDS[:, 6:], past_key_values=cache, **ENCODER).last_hidden_state
        torch.testing.assert_close(found, whole[:, 6:], **CLOSE)


@torch.no_grad()
def test_rows_of_a_static_cache_are_chosen_and_repeated() -> None:
    model = decoder()
    both = EncoderDecoderCache(StaticCache(SIZES, 24), DynamicCache())
    model(IDS[:, :5], past_key_values=both, **ENCODER)
    whole = model(IDS, **ENCODER).last_hidden_state[:, 5:]
    both.batch_select_indices(torch.tensor([1]))
    both.batch_repeat_interleave(3)
    given = {"past_key_values": both, "encoder_attention_mask": SEEN[[1, 1, 1]]}
    found = model(IDS[1:2, 5:].expand(3, -1), **given).last_hidden_state
    torch.testing.assert_close(found, whole[1:2].expand(3, -1, -1), **CLOSE)


@torch.no_grad()
def test_caches_that_do_not_fit() -> None:
    model = decoder()
    with pytest.raises(TypeError, match="self_attention_cache is a list; it must be a DynamicCach"):
        EncoderDecoderCache([], DynamicCache())  # type: ignore[arg-type]
    static = StaticCache(SIZES, 24)
    with pytest.raises(TypeError, match="cross_attention_cache is a StaticCache; it must be a Dyn"):
        EncoderDecoderCache(DynamicCache(), static)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="past_key_values is a tuple; it must be a DynamicCache"):
        model(IDS, past_key_values=((STATES, STATES),))
    with pytest.raises(ValueError, match=r"max_cache_len=25 tokens; the model has positions for"):
        model(IDS, past_key_values=StaticCache(SIZES, 25))
    cache = model(IDS[:, :5], **ENCODER).past_key_values
    with pytest.raises(ValueError, match="has 6 tokens, but the cache holds keys of 7"):
        model(IDS[:, 5:], past_key_values=cache, encoder_hidden_states=STATES[:, :6])
    with pytest.raises(ValueError, match="sequences have 25 tokens; the model has positions"):
        model(torch.ones(B, 20).long(), past_key_values=cache)
    blind = decoder(add_cross_attention=False)
    with pytest.raises(ValueError, match="an EncoderDecoderCache need cross-attention"):
        blind(IDS, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
