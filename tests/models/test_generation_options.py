"""generate's other options: the tokens of transformers, or of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.generating import V, both, ids, tiny_llamas
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
    penalty = RepetitionPenalty(2.0, Prompt(ids([0, 0, 4], [0, 0, 5]), ids([0, 1, 1], [0, 0, 1])))
    logits = torch.tensor([[3.0, -1.0, 0.0, 2.0, 8.0, -2.0]] * 2)
    first = [[1.5, -1.0, 0.0, 2.0, 4.0, -2.0], [3.0, -1.0, 0.0, 2.0, 8.0, -4.0]]
    assert penalty(logits).tolist() == first
    penalty.add(torch.tensor([3, 1]))
    second = [[1.5, -1.0, 0.0, 1.0, 4.0, -2.0], [3.0, -2.0, 0.0, 2.0, 8.0, -4.0]]
    assert penalty(logits).tolist() == second
    assert penalty(logits.bfloat16()).dtype == torch.float32


def test_penalty_ignores_ids_that_the_head_has_not() -> None:
    penalty = RepetitionPenalty(2.0, Prompt(ids([1, 9]), None))
    assert penalty(torch.ones(1, 3)).tolist() == [[1.0, 0.5, 1.0]]


def test_penalty_reads_nothing_back() -> None:
    with FakeTensorMode():
        prompt = Prompt(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
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
