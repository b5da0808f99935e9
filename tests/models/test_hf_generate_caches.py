"""Any cache with transformers' methods serves our models: theirs of every kind, and ours in theirs.

The reference is one forward without a cache, and transformers' own model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe.hf
from support.families import FAMILIES, pair, tokens
from swathe.kernels.attention.api import Mask, attention
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cache_protocol import METHODS, KeyValueCache, LayerMasks, fitted
from swathe.modeling.hf.generation import CACHE, new_cache

CLOSE: Any = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 13  # past the tiny families' windows of 5
STEPS = {"prompt first": [8, *[1] * 5], "in pieces": [3, 2, 5, 1, 2]}


@lru_cache(maxsize=2)
def model(family: str, attn: str = "eager") -> Any:
    return pair(family, {"attn": attn, **dict.fromkeys(("norm", "rope", "mlp"), "eager")})[1]


def foreign(kind: str, family: str) -> Any:
    if kind == "dynamic without layers":
        return transformers.DynamicCache()
    config = model(family).config
    if kind == "static":
        made = new_cache(config, "offloaded_static", LENGTH + 3, None)
        made.offloading = False
        return made
    return new_cache(config, None, 0, None)


def padded(side: str | None) -> Tensor | None:
    if side is None:
        return None
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    if side == "holes":
        mask[1, 4] = 0
    return mask


@torch.no_grad()
def in_steps(family: str, cache: Any, steps: list[int], mask: Tensor | None, attn: str) -> Tensor:
    ids, begin, out = tokens(2, LENGTH), 0, None
    logits: list[Tensor] = []
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for step in steps:
        end = begin + step
        out = model(family, attn)(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, begin:end],
            past_key_values=cache,
        )
        logits.append(out.logits)
        begin = end
    assert out is not None and out.past_key_values is cache
    return torch.cat(logits, 1)


@pytest.mark.parametrize("side", [None, "holes"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic without layers", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_through_their_caches_are_one_forward(
    family: str, kind: str, side: str | None
) -> None:
    mask = padded(side)
    real = slice(None) if mask is None else mask.bool()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(family)(
            tokens(2, LENGTH), attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    for steps in STEPS.values():
        found = in_steps(family, foreign(kind, family), steps, mask, "eager")
        torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("attn", ["sdpa", "triton"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_their_caches_on_every_backend(family: str, attn: str) -> None:
    mask = padded("left")
    assert mask is not None
    for kind in ("dynamic", "static"):
        expected = in_steps(family, foreign(kind, family), [8, 1, 1, 3], mask, "eager")
        found = in_steps(family, foreign(kind, family), [8, 1, 1, 3], mask, attn)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_caches_hold_what_transformers_models_put_there(family: str) -> None:
    theirs, ours = pair(family, "eager")
    caches: list[Any] = [transformers.DynamicCache(config=theirs.config) for _ in range(2)]
    for one, cache in zip((theirs, ours), caches, strict=True):
        name = CACHE if one is theirs else "past_key_values"
        with torch.no_grad():
            for begin in (0, 8):
                one(tokens(2, LENGTH)[:, begin : begin + 8], **{name: cache})
    for other, mine in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, **CLOSE)
        torch.testing.assert_close(mine.values, other.values, **CLOSE)
    sliding = [type(layer).__name__ for layer in caches[1].layers].count(
        "DynamicSlidingWindowLayer"
    )
    assert sliding == 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_a_cache_that_is_handed_to_generate(family: str) -> None:
    theirs, ours = pair(family, "eager")
    swathe.hf.with_generate(ours)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
    for beams in (1, 3):
        expected = theirs.generate(ids, num_beams=beams, **asked)
        for cache in (
            DynamicCache(),
            StaticCache(ours.config, 17),
            transformers.DynamicCache(),
            new_cache(ours.config, None, 0, None),
            transformers.StaticCache(theirs.config, max_cache_len=17),
        ):
            found = ours.generate(ids, num_beams=beams, **{CACHE: cache}, **asked)
            assert torch.equal(found, expected), type(cache)
            assert int(cache.get_seq_length()) == 16
    with pytest.raises(ValueError, match="pass one of them"):
        ours.generate(ids, **{CACHE: DynamicCache()}, cache_implementation="static", **asked)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_conversation_goes_on_from_its_cache(kind: str) -> None:
    theirs, ours = pair("llama", "eager")
    swathe.hf.with_generate(ours)
    found = []
    for one in (theirs, ours):
        cache = DynamicCache() if (kind, one) == ("ours", ours) else transformers.DynamicCache()
        ids = tokens(1, 6)
        for turn in range(3):
            ids = torch.cat((ids, tokens(1, 3, seed=turn)), 1)
            ids = one.generate(ids, max_new_tokens=4, pad_token_id=0, **{CACHE: cache})
        found.append(ids)
    assert torch.equal(*found)


def test_an_assistant_on_our_cache() -> None:
    _, ours = pair("llama", "eager")
    swathe.hf.with_generate(ours)
    ids = tokens(1, 5).repeat(1, 4)
    asked: dict[str, Any] = {"max_new_tokens": 10, "pad_token_id": 0}
    if CACHE == "past_key_values":  # this version's loop crops to a length, not by a number
        with pytest.raises(ValueError, match="pass a negative number"):
            ours.generate(ids, past_key_values=DynamicCache(), prompt_lookup_num_tokens=3, **asked)
        return
    expected = ours.generate(ids, **asked)
    for cache in (DynamicCache(), StaticCache(ours.config, 40)):
        found = ours.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **asked)
        assert torch.equal(found, expected)


def test_quantized_caches_come_from_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Quantized(transformers.DynamicCache):
        def __init__(self, **options: Any) -> None:
            seen.append(options)
            super().__init__()

    monkeypatch.setattr(transformers, "QuantizedCache", Quantized)
    _, ours = pair("mistral", "eager")
    swathe.hf.with_generate(ours).generate(
        tokens(1, 4),
        max_new_tokens=2,
        pad_token_id=0,
        cache_implementation="quantized",
        cache_config={"backend": "hqq", "nbits": 4},
    )
    config = seen[0].pop("config")
    assert (
        seen == [{"backend": "hqq", "nbits": 4}] and config.layer_types == ["sliding_attention"] * 4
    )


class Last:
    """The smallest cache of the protocol: it keeps `keep` tokens before the new ones."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.seen: dict[int, int] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        old = self.kept.get(layer_idx, (k[:, :, :0], v[:, :, :0]))
        both = tuple(torch.cat(parts, 2) for parts in zip(old, (k, v), strict=True))
        self.seen[layer_idx] = self.get_seq_length(layer_idx) + k.shape[2]
        first = max(both[0].shape[2] - self.keep, 0)
        self.kept[layer_idx] = both[0][:, :, first:], both[1][:, :, first:]
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen.get(layer_idx, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        offset = max(self.get_seq_length(layer_idx) - self.keep, 0)
        return self.get_seq_length(layer_idx) - offset + query_length, offset


def test_the_protocol_is_three_methods() -> None:
    cache: KeyValueCache = Last(4)  # mistral's window of 5 sees four keys before a token
    assert {name for name in vars(KeyValueCache) if not name.startswith("_")} == set(METHODS)
    for mask in (None, padded("holes")):
        found = in_steps("mistral", Last(4), STEPS["in pieces"], mask, "eager")
        expected = in_steps("mistral", DynamicCache(), STEPS["in pieces"], mask, "eager")
        torch.testing.assert_close(found[:, 3:], expected[:, 3:], **CLOSE)
    short = in_steps("mistral", Last(2), STEPS["in pieces"], None, "eager")
    assert not torch.allclose(short, expected, atol=1e-3)
    assert LayerMasks.of(cache, torch.zeros(1, 2, 3)) is not None
    for own in (None, DynamicCache(), StaticCache(model("llama").config, 3)):
        assert LayerMasks.of(own, torch.zeros(1, 2, 3)) is None


def test_what_is_no_cache_is_refused() -> None:
    class Half:
        def get_seq_length(self) -> int:
            return 0

    for other in (Half(), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(TypeError, match=rf"is a {type(other).__name__}; .*'get_mask_sizes'"):
            model("llama")(tokens(), past_key_values=other)
    wrong = Last(3)
    wrong.get_mask_sizes = lambda query_length, layer_idx: (query_length, 0)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="3 keys from 0 on, which do not reach the 8"):
        in_steps("llama", wrong, [5, 3], None, "eager")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given", ["nothing", "start", "keys", "allowed", "bias", "broadcast"])
def test_a_fitted_mask_shows_the_same_keys(given: str, causal: bool, window: int | None) -> None:
    B, T, total, offset, room = 2, 3, 9, 2, 4
    torch.manual_seed(1)
    parts: dict[str, Any] = {
        "nothing": {},
        "start": {"start": torch.tensor([0, 4]), "end": torch.tensor([8, 9])},
        "keys": {"keys": torch.rand(B, total) > 0.4},
        "allowed": {"allowed": torch.rand(B, 1, T, total) > 0.4},
        "bias": {"bias": torch.randn(1, 2, T, total)},
        "broadcast": {"allowed": torch.rand(B, 1, T, 1) > 0.4},
    }[given]
    mask = Mask(causal=causal, window=window, **parts)
    device = torch.device("cpu")
    for length, begin in ((total, 0), (total - offset, offset), (total - offset + room, offset)):
        seen = mask.visible(T, total, device)[..., begin:]
        found = fitted(mask, T, total, length, begin, device)
        visible = found.visible(T, length, device)
        assert torch.equal(visible[..., : total - begin].broadcast_to(seen.shape), seen)
        assert not visible[..., total - begin :].any()
    q, k = torch.randn(B, 2, T, 16), torch.randn(B, 2, total, 16)
    more = torch.cat((k, torch.full((B, 2, room, 16), 7.0)), 2)
    expected = attention(q, k, k, mask, implementation="eager")
    roomy = fitted(mask, T, total, total + room, 0, device)
    found = attention(q, more, more, roomy, implementation="eager")
    torch.testing.assert_close(found, expected, **CLOSE)
