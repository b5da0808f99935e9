"""Losses of the heads beside transformers' own: problem types, ignored labels, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.loss.loss_utils import (
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
)

import swathe
from swathe.modeling.losses import (
    question_answering_loss,
    sequence_classification_loss,
    token_loss,
)
from swathe.modeling.masks import looked_at

PROBLEMS: dict[str, tuple[int, Tensor, str]] = {
    "one number": (1, torch.tensor([0.5, -1.0, 2.0, 0.0]), "regression"),
    "one number in a column": (1, torch.tensor([[0.5], [-1.0], [2.0], [0.0]]), "regression"),
    "three numbers": (3, torch.linspace(-1, 1, 12).view(4, 3), "regression"),
    "classes": (3, torch.tensor([0, 2, 1, 1]), "single_label_classification"),
    "int32 classes": (3, torch.tensor([0, 2, 1, 1], dtype=torch.int32), "single_label_class"),
    "some ignored": (3, torch.tensor([0, -100, 1, -100]), "single_label_classification"),
    "labels": (3, (torch.arange(12).view(4, 3) % 2).float(), "multi_label_classification"),
    "soft labels": (3, torch.linspace(0, 1, 12).view(4, 3), "multi_label_classification"),
}


def logits_of(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, count, generator=generator).to(dtype).requires_grad_()


def both(mine: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs)
    grads = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (mine, theirs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", PROBLEMS)
def test_problem_types(case: str) -> None:
    count, labels, kind = PROBLEMS[case]
    kind = "single_label_classification" if kind.startswith("single") else kind
    logits = logits_of(count)
    config = transformers.LlamaConfig(num_labels=count, problem_type=kind)
    as_they_take_it = labels.long() if labels.dtype == torch.int32 else labels
    expected = ForSequenceClassificationLoss(as_they_take_it, logits, config)
    both(sequence_classification_loss(logits, labels, kind), expected, logits)
    if case != "three numbers":
        inferred = sequence_classification_loss(logits, labels)
        assert torch.equal(inferred, sequence_classification_loss(logits, labels, kind))


def test_inference_is_per_call() -> None:
    logits, classes, floats = logits_of(3), torch.tensor([0, 2, 1, 1]), torch.rand(4, 3)
    first = sequence_classification_loss(logits, classes)
    second = sequence_classification_loss(logits, floats)
    assert first != second and torch.equal(sequence_classification_loss(logits, classes), first)
    picked = floats > 0.5
    assert torch.equal(
        sequence_classification_loss(logits, picked),
        sequence_classification_loss(logits, picked.float()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_at_least_fp32(dtype: torch.dtype) -> None:
    for count, labels, kind in (PROBLEMS[c] for c in ("one number", "classes", "labels")):
        logits = logits_of(count, dtype)
        loss = sequence_classification_loss(logits, labels, kind)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        exact = sequence_classification_loss(logits.double(), labels, kind)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_tokens_and_answers() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 7, generator=generator).requires_grad_()
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 2:] = -100
    both(token_loss(logits, labels), ForMaskedLMLoss(logits, labels, 7), logits)
    both(
        token_loss(logits, labels, num_items_in_batch=20),
        ForMaskedLMLoss(logits, labels, 7, num_items_in_batch=torch.tensor(20)),
        logits,
    )
    for positions in (
        (torch.tensor([0, 4]), torch.tensor([[2], [9]])),
        (torch.tensor([-3, 5]), torch.tensor([1, -100])),
    ):
        start, end = logits[..., 0], logits[..., 1]
        mine = question_answering_loss(start, end, *positions)
        both(mine, ForQuestionAnsweringLoss(start, end, *positions), logits)


def test_nothing_to_learn_is_a_loss_of_0() -> None:
    logits = torch.randn(2, 5, 3).requires_grad_()
    nothing = torch.full((2, 5), -100)
    past = torch.tensor([5, 99])
    for loss in (
        token_loss(logits, nothing),
        sequence_classification_loss(logits[:, 0], nothing[:, 0]),
        question_answering_loss(logits[..., 0], logits[..., 1], past, past),
    ):
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0.0 and not grad.any()


SINGLE = "single_label_classification"
REFUSED: list[tuple[Any, str]] = [
    (
        (3, torch.zeros(4, 3, dtype=torch.long), None),
        rf"'{SINGLE}' .inferred from labels. with",
    ),
    ((3, torch.zeros(3, dtype=torch.long), None), r"labels are torch.int64 of shape \(3,\); they"),
    (
        (3, torch.zeros(4), None),
        r"'multi_label_classification' .*be numbers of shape \(4, 3\)",
    ),
    ((3, torch.zeros(4, 3), SINGLE), rf"'{SINGLE}' .given. .*whole numbers of shape \(4,\). Set"),
    ((3, torch.zeros(4), "regression"), r"'regression' .*numbers of shape \(4, 3\)"),
    ((1, torch.zeros(4, 2), None), r"'regression' .inferred.*numbers of shape \(4,\)"),
    ((3, torch.zeros(4), "classification"), "problem_type='classification'; allowed: .'regression"),
    ((3, torch.tensor([0, 3, 1, 1]), None), "labels hold 3, but there are 3 classes; labels must"),
    ((3, torch.tensor([0, -1, 1, 1]), None), "labels hold -1, .* 0 to 2, or -100 to be ignored"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_labels_that_do_not_fit(case: int) -> None:
    (count, labels, kind), message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        sequence_classification_loss(logits_of(count), labels, kind)


def test_where_values_are_looked_at() -> None:
    def like(kind: str, count: int = 3, meta: bool = False) -> Any:
        stands_for = {"device": SimpleNamespace(type=kind), "is_meta": meta, "is_cuda": False}
        return SimpleNamespace(**stands_for, numel=lambda: count)

    assert looked_at(like("cpu")) and not looked_at(like("cuda"))
    with swathe.debug():
        assert looked_at(like("cuda"))
        assert not looked_at(like("cuda", 0)) and not looked_at(like("meta", meta=True))


def test_tokens_and_positions_that_do_not_fit() -> None:
    logits = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"labels are \(2, 4\) and logits \(2, 5, 3\)"):
        token_loss(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="labels hold 7, but there are 3 classes"):
        token_loss(logits, torch.full((2, 5), 7))
    whole, floats = torch.zeros(2, dtype=torch.long), torch.zeros(2)
    for positions, name in (((floats, whole), "start"), ((whole, whole[:1]), "end")):
        with pytest.raises(ValueError, match=rf"{name}_positions is .* whole numbers of shape"):
            question_answering_loss(logits[..., 0], logits[..., 1], *positions)
