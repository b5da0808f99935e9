"""generate's other options: the tokens of transformers, or of each row alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.generating import Counter, V, both, ids, tiny_llamas
from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.generation.repetition import RepetitionPenalty


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_llamas(tmp_path_factory.mktemp("llama"))


def padded_left(*pads: int, tokens: int = 9) -> tuple[Tensor, Tensor]:
    """(prompt, mask): a row for each number of padding tokens on its left."""
    prompt = torch.randint(3, 64, (len(pads), tokens))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return prompt * mask, mask


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_penalty_equals_transformers(pair: tuple[Any, Any], penalty: float) -> None:
    prompt = torch.randint(3, 64, (4, 9))
    ours, theirs = both(pair, prompt, repetition_penalty=penalty)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, both(pair, prompt)[0])


def test_padding_is_not_penalised(pair: tuple[Any, Any]) -> None:
    prompt, mask = padded_left(0, 3, 7)
    prompt[mask == 0] = 33  # a token that the model may well choose
    options: dict[str, Any] = {"repetition_penalty": 3.0, "eos_token_id": []}
    ours, theirs = both(pair, prompt, attention_mask=mask, **options)
    assert torch.equal(ours, theirs)
    for row, pads in enumerate((0, 3, 7)):
        alone = pair[0].generate(prompt[row : row + 1, pads:], max_new_tokens=24, **options)
        assert torch.equal(alone[0], ours[row, pads:])


def test_penalty_of_a_padding_token_that_is_text_too() -> None:
    penalty = RepetitionPenalty(
        2.0, Prompt.of(ids([0, 0, 4], [0, 0, 5]), ids([0, 1, 1], [0, 0, 1]))
    )
    logits = torch.tensor([[3.0, -1.0, 0.0, 2.0, 8.0, -2.0]] * 2)
    first = [[1.5, -1.0, 0.0, 2.0, 4.0, -2.0], [3.0, -1.0, 0.0, 2.0, 8.0, -4.0]]
    assert penalty(logits).tolist() == first
    penalty.add(torch.tensor([3, 1]))
    second = [[1.5, -1.0, 0.0, 1.0, 4.0, -2.0], [3.0, -2.0, 0.0, 2.0, 8.0, -4.0]]
    assert penalty(logits).tolist() == second
    assert penalty(logits.bfloat16()).dtype == torch.float32


def test_penalty_ignores_ids_that_the_head_has_not() -> None:
    penalty = RepetitionPenalty(2.0, Prompt.of(ids([1, 9])))
    assert penalty(torch.ones(1, 3)).tolist() == [[1.0, 0.5, 1.0]]


def test_penalty_reads_nothing_back() -> None:
    with FakeTensorMode():
        prompt = Prompt.of(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
        penalty = RepetitionPenalty(1.2, prompt)
        penalty(torch.empty(2, V))
        penalty.add(torch.ones(2, dtype=torch.long))
        assert penalty(torch.empty(2, V)).shape == (2, V)


def test_penalty_with_sampling_and_end(pair: tuple[Any, Any]) -> None:
    prompt = torch.randint(3, 64, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_k": 1}
    sampled = pair[0].generate(prompt, repetition_penalty=1.5, min_new_tokens=4, **options)
    greedy = pair[0].generate(prompt, repetition_penalty=1.5, min_new_tokens=4, max_new_tokens=12)
    assert torch.equal(sampled, greedy)


# a row each: right, left, both sides, none, a hole and right
RAGGED = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 1, 1, 0],
    ]
)


@pytest.mark.parametrize("rows", [[0], [0, 2], [1, 0], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_on_any_side_equals_each_row_alone(
    pair: tuple[Any, Any], rows: list[int], cache: str
) -> None:
    mask = RAGGED[rows]
    prompt = torch.randint(3, 64, mask.shape)
    prompt[mask == 0] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 16, "cache_implementation": cache, "repetition_penalty": 1.2
    }  # fmt: skip
    out = pair[0].generate(prompt, attention_mask=mask, eos_token_id=[], **options)
    assert torch.equal(out[:, :8], prompt) and out.shape == (len(rows), 24)
    for i in range(len(rows)):
        tokens = prompt[i][mask[i] == 1][None]
        alone = pair[0].generate(tokens, eos_token_id=[], **options)
        assert torch.equal(alone[0, tokens.shape[1] :], out[i, 8:])


def test_padding_on_the_right_is_moved_before_the_model_sees_it() -> None:
    model = Counter()
    seen: list[Tensor] = []
    out = model.generate(
        ids([4, 0, 0], [0, 7, 0], [5, 0, 6]), max_new_tokens=2, pad_token_id=0,
        attention_mask=ids([1, 0, 0], [0, 1, 0], [1, 0, 1]),
        streamer=SimpleNamespace(put=seen.append, end=lambda: None),
    )  # fmt: skip
    assert out.tolist() == [[4, 0, 0, 5, 6], [0, 7, 0, 8, 9], [5, 0, 6, 7, 8]]
    first, second = model.calls
    assert first["input_ids"].tolist() == [[0, 0, 4], [0, 0, 7], [0, 5, 6]]
    assert first["attention_mask"].tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 1]]
    assert first["position_ids"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert second["position_ids"].tolist() == [[1], [1], [2]]
    assert seen[0].tolist() == [[4, 0, 0], [0, 7, 0], [5, 0, 6]]


def test_rows_padded_on_the_right_end_by_themselves() -> None:
    out = Counter().generate(
        ids([5, 0], [30, 31]), attention_mask=ids([1, 0], [1, 1]), max_new_tokens=9,
        eos_token_id=[7, 35], pad_token_id=0,
    )  # fmt: skip
    assert out.tolist() == [[5, 0, 6, 7, 0, 0], [30, 31, 32, 33, 34, 35]]


def test_max_length_equals_transformers(pair: tuple[Any, Any]) -> None:
    prompt, mask = padded_left(0, 3)
    options: dict[str, Any] = {"max_new_tokens": None, "max_length": 17, "eos_token_id": []}
    ours, theirs = both(pair, prompt, attention_mask=mask, **options)
    assert torch.equal(ours, theirs) and ours.shape == (2, 17)
