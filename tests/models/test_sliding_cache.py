"""DynamicCache with a configuration: windows drop what they have passed, and nothing changes."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from support.families import pair, tokens
from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache
from swathe.modeling.cache_layers import FIRST_CAPACITY, SlidingLayer

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
B, K, D = 2, 3, 4


def sliding(window: int | None, layers: int = 1) -> DynamicCache:
    config: Any = SimpleNamespace(num_hidden_layers=layers, window=lambda _: window)
    return DynamicCache(config=config)


def chunk(length: int, grad: bool = False) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, B, K, length, D).unbind()
    return k.requires_grad_(grad), v.requires_grad_(grad)


@pytest.mark.parametrize("window", [1, 2, 7, 40, 100])
@pytest.mark.parametrize("lengths", [(1,) * 150, (3, 1, 90, 1, 1, 64, 7), (0, 200, 1, 0, 1)])
@pytest.mark.parametrize("grads", [(False,), (True,), (False, True, False)])
def test_the_window_and_the_new_tokens_come_back(
    window: int, lengths: tuple[int, ...], grads: tuple[bool, ...]
) -> None:
    cache, given = sliding(window), [chunk(0)]
    for i, length in enumerate(lengths):
        given.append(chunk(length, grads[i % len(grads)]))
        before = cache.get_seq_length()
        count, first = cache.get_mask_sizes(length)
        keys, values = cache.update(*given[-1], 0)
        assert first == max(0, before - window + 1) and count == before - first + length
        for found, parts in zip((keys, values), zip(*given, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts, 2)[:, :, first:])
        assert cache.get_seq_length() == before + length
    assert cache.is_sliding == [True] and sliding(None).is_sliding == [False]


def test_memory_and_copies_do_not_grow() -> None:
    window, cache, buffers = 50, sliding(50), set()
    for length in (20 * window, *[1] * (10 * window)):
        cache.update(*chunk(length), 0)
        layer = cache._layers[0]
        assert isinstance(layer, SlidingLayer) and layer.keys is not None
        assert layer.keys.untyped_storage().nbytes() // (4 * B * K * D) <= 2 * window
        buffers.add(layer.dropped)
    assert len(buffers) <= 12 and cache.get_seq_length() == 30 * window
    small = sliding(4)
    for _ in range(200):
        small.update(*chunk(1), 0)
    assert small._layers[0].keys.shape[2] == FIRST_CAPACITY  # type: ignore[union-attr]


def test_sizes_are_transformers() -> None:
    reference, model = pair("gemma3_text")
    other = transformers.DynamicCache(config=reference.config)
    cache = DynamicCache(config=model.config)
    assert cache.is_sliding == list(other.is_sliding)
    for length in (3, 1, 1, 4, 1, 1):
        for layer in range(model.config.num_hidden_layers):
            for query in (1, 3):
                sizes = other.get_mask_sizes(query, layer)
                assert cache.get_mask_sizes(query, layer) == sizes
            k, v = chunk(length)
            mine, theirs = (some.update(k, v, layer) for some in (cache, other))
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
            assert cache.get_seq_length(layer) == other.get_seq_length(layer)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_pieces_are_the_whole(family: str, attn: str, padded: bool) -> None:
    if (family, attn) == ("gpt_oss", "sdpa"):
        pytest.skip("torch's own attention has no sinks")
    _, model = pair(family, {"attn": attn})
    ids, mask = tokens(length=24), torch.ones(2, 24, dtype=torch.long)
    if padded:
        mask[0, :7] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    ends = (9, 10, 11, 14, 22, 23, 24)
    for start, end in zip((0, *ends), ends, strict=False):
        given = {"attention_mask": mask[:, :end] if padded else None, "past_key_values": cache}
        pieces.append(model(ids[:, start:end], **given).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], **CLOSE)
    held = [cache.get_mask_sizes(0, i)[0] for i in range(len(cache))]
    assert set(held) == ({4} if family == "mistral" else {4, 24})


@torch.no_grad()
def test_full_masks_and_rows() -> None:
    _, model = pair("mistral")
    ids = tokens(length=16)
    allowed = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.2
    allowed |= torch.eye(16, dtype=torch.bool)
    bias = torch.randn(2, 4, 16, 16)
    for mask in (allowed, bias):
        cache = DynamicCache(config=model.config)
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        model(ids[:, :9], attention_mask=mask[:, :, :9, :9], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 3, 1, 0]))
        order = [0, 0, 1, 1]
        for at in range(9, 16):
            given = mask[order][:, :, at : at + 1, : at + 1]
            found = model(ids[order, at : at + 1], attention_mask=given, past_key_values=cache)
            torch.testing.assert_close(found.logits[:, 0], whole[order, at], **CLOSE)


def test_cropping_goes_back_to_what_is_held() -> None:
    cache, (k, v) = sliding(8, layers=2), chunk(30)
    for layer in range(2):
        cache.update(k[:, :, :20], v[:, :, :20], layer)
    for at in range(20, 30):
        for layer in range(2):
            cache.update(k[:, :, at : at + 1], v[:, :, at : at + 1], layer)
    cache.crop(-10)
    assert cache.get_seq_length(1) == 20
    keys, _ = cache.update(k[:, :, 25:26], v[:, :, 25:26], 0)
    assert torch.equal(keys, torch.cat((k[:, :, 13:20], k[:, :, 25:26]), 2))
    message = r"19 of 21 tokens .* window of 8 has dropped the first 13, .* without a configuration"
    with pytest.raises(ValueError, match=message):
        cache.crop(-2)
    assert cache.get_seq_length() == 21 and cache.get_seq_length(1) == 20
    cache.reset()
    assert cache.get_mask_sizes(3) == (3, 0) and cache.is_sliding == [True, True]


def test_generate_holds_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("gemma3_text")
    made: list[DynamicCache] = []
    real = DynamicCache.__init__

    def init(self: DynamicCache, **options: Any) -> None:
        real(self, **options)
        made.append(self)

    monkeypatch.setattr(DynamicCache, "__init__", init)
    model.generate(tokens(), max_new_tokens=80, eos_token_id=[])
    (cache,) = made
    held = [layer.keys.shape[2] for layer in cache._layers if layer.keys is not None]
    assert held == [FIRST_CAPACITY if is_sliding else 128 for is_sliding in cache.is_sliding]
    assert {cache.get_seq_length(i) for i in range(7)} == {90} and len(set(cache.is_sliding)) == 2


MASKS: dict[str, Mask] = {
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=4),
    "padding": Mask(causal=True, start=torch.tensor([0, 6]), end=torch.tensor([12, 11])),
    "prefix": Mask(causal=True, prefix=torch.tensor([3, 11])),
    "both": Mask(causal=True, prefix=torch.tensor([3, 9]), start=torch.tensor([1, 2])),
    "chunk": Mask(causal=True, chunk=5, start=torch.tensor([0, 7])),
    "places": Mask(causal=True, places=torch.tensor([[6, 8, 9], [9, 10, 11]])),
    "keys": Mask(causal=True, keys=torch.arange(24).view(2, 12) % 3 > 0),
    "allowed": Mask(allowed=torch.arange(36).view(1, 1, 3, 12) % 4 > 0),
    "of rows": Mask(allowed=torch.tensor([True, False, True]).view(1, 1, 3, 1)),
    "bias": Mask(causal=True, bias=torch.randn(2, 1, 3, 12)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_without_its_first_keys(name: str) -> None:
    mask, cpu = MASKS[name], torch.device("cpu")
    assert mask.from_key(0) is mask
    for first in (1, 5, 9):
        found = mask.from_key(first).visible(3, 12 - first, cpu)
        expected = mask.visible(3, 12, cpu)[..., first:]
        assert torch.equal(*torch.broadcast_tensors(found, expected))
    assert {f.name for f in fields(Mask) if f.init} == {
        "causal", "window", "ahead", "chunk", "start", "end", "prefix", "keys", "allowed", "bias",
        "places", "rows_may_be_empty",
    }, "from_key must know every part"  # fmt: skip
    with pytest.raises(ValueError, match="chunk=5 counts from the first key"):
        Mask(causal=True, chunk=5).from_key(1)
