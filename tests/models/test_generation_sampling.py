"""Sampling: the filters are transformers', the draws follow the filtered softmax, seeds repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.generating import Counter, V, ids, tiny_llamas
from swathe.modeling.generation.sampling import filtered, sample


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_llamas(tmp_path_factory.mktemp("llama"))


Filters = tuple[float, int | None, float | None, float | None]
FILTERS: list[Filters] = [
    (1.0, None, None, None), (0.7, 5, None, None), (1.3, None, 0.8, None), (0.9, 20, 0.6, None),
    (1.0, 99, 1.0, 0.0), (1.5, None, None, 0.1), (0.8, 9, None, 0.3), (2.0, 30, 0.9, 0.05),
    (1.0, None, 0.7, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("options", FILTERS)
def test_filters_keep_what_transformers_keeps(options: Filters) -> None:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    temperature, top_k, top_p, min_p = options
    logits = torch.randn(8, V) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    scores, tokens = filtered(logits, *options)
    if tokens is not None:
        scores = torch.full_like(logits, float("-inf")).scatter(-1, tokens, scores)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("options", FILTERS)
def test_samples_follow_the_filtered_softmax(options: Filters) -> None:
    draws = 40_000
    logits = torch.randn(1, 12) * 1.5
    scores, tokens = filtered(logits, *options)
    p = scores.softmax(-1)[0].double()
    if tokens is not None:
        p = torch.zeros(12, dtype=torch.double).scatter(0, tokens[0], p)
    generator = torch.Generator().manual_seed(7)
    drawn = sample(logits.expand(draws, -1), *options, generator=generator)
    frequency = drawn.bincount(minlength=12).double() / draws
    assert not (frequency[p == 0]).any()
    bound = 5 * (p * (1 - p) / draws).sqrt()  # five standard deviations
    assert ((frequency - p).abs() <= bound + 1e-9).all()


def test_sampling_is_reproducible_by_seed() -> None:
    model = Counter()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            ids([5], [6]), max_new_tokens=12, do_sample=True, temperature=2.0, generator=generator
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_the_global_seed_counts_without_a_generator() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Counter().generate(ids([5], [6]), max_new_tokens=12, do_sample=True)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_equal_rows_draw_by_themselves() -> None:
    out = Counter().generate(ids(*[[5]] * 8), max_new_tokens=12, do_sample=True)
    assert len({tuple(row) for row in out.tolist()}) == 8


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sequences_of_a_row_stand_together(pair: tuple[Any, Any], cache: str) -> None:
    prompt, mask = torch.randint(3, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = mask[1, :2] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 10, "do_sample": True, "temperature": 3.0, "cache_implementation": cache
    }  # fmt: skip

    def draw(prompt: Tensor, mask: Tensor, **more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return pair[0].generate(prompt, attention_mask=mask, generator=generator, **options, **more)

    out = draw(prompt, mask, num_return_sequences=3)
    repeated = (t.repeat_interleave(3, 0) for t in (prompt, mask))
    assert torch.equal(out, draw(*repeated)) and out.shape == (6, 17)
    assert len({tuple(row) for row in out[:3].tolist()}) == 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_is_read_once(cache: str) -> None:
    model = Counter(num_hidden_layers=1)
    model.generate(
        ids([5, 0], [7, 8]), attention_mask=ids([1, 0], [1, 1]), max_new_tokens=3, pad_token_id=0,
        do_sample=True, num_return_sequences=3, cache_implementation=cache,
    )  # fmt: skip
    assert [call["input_ids"].shape[0] for call in model.calls] == [2, 6, 6]
    for name in ("attention_mask", "position_ids"):
        rows = [None if call[name] is None else call[name].shape[0] for call in model.calls]
        # a static cache knows what its steps see
        assert rows == ([2, None, None] if cache == "static" else [2, 6, 6])
    assert model.calls[0]["input_ids"].tolist() == [[0, 5], [7, 8]]


def test_order_of_sequences_is_that_of_transformers(pair: tuple[Any, Any]) -> None:
    prompt = torch.randint(3, 64, (2, 7))
    options: dict[str, Any] = {
        "max_new_tokens": 10, "do_sample": True, "top_k": 1, "num_return_sequences": 3,
        "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    ours, theirs = (model.generate(prompt, **options) for model in pair)
    assert torch.equal(ours, theirs) and not torch.equal(ours[2], ours[3])


def test_sampling_reads_nothing_back() -> None:
    with FakeTensorMode():
        token = sample(torch.empty(3, V), 0.7, 10, 0.9, 0.1)  # fake tensors have no values to read
    assert token.shape == (3,) and token.dtype == torch.int64


def test_a_zero_draw_chooses_no_cut_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "exponential_", lambda self, **_: self.zero_())
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert sample(logits).item() == 2
