"""Arguments of several processors in one dict: what collides or does not fit is named."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from support.examples import TINY
from swathe.modeling.examples.my_new_model import (
    MyNewModelConfig,
    MyNewModelForSequenceClassification,
    MyNewModelModel,
)
from swathe.modeling.inputs import merge_model_inputs, prepare_inputs
from swathe.modeling.outputs import BaseModelOutputWithPast

TEXTS = ["a cat sat", "cat", "a mat"]
WORDS = ("[PAD]", "[UNK]", "a", "cat", "sat", "mat")
IDS = torch.tensor([[2, 3, 4], [3, 0, 0], [2, 5, 0]])


def tokenizer() -> Any:
    """transformers' fast tokenizer over six words, which pads."""
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    )
    return partial(made, padding=True)


def pictures(samples: Any, /, *, return_tensors: str) -> dict[str, Tensor]:
    """Colours (B, 3) of pictures, as an image processor gives them."""
    assert return_tensors == "pt"
    return {"pixel_values": torch.stack([picture.mean((1, 2)) for picture in samples])}


class SeeingModel(nn.Module):
    """MyNewModel's body behind one more token, made from a picture's colours."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MyNewModelModel(MyNewModelConfig(**TINY))
        self.project = nn.Linear(3, TINY["hidden_size"])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor
    ) -> BaseModelOutputWithPast:
        seen = self.project(pixel_values)[:, None]
        vectors = torch.cat([seen, self.body.get_input_embeddings()(input_ids)], 1)
        mask = nn.functional.pad(attention_mask, (1, 0), value=1)
        return self.body(inputs_embeds=vectors, attention_mask=mask)


def test_texts_and_pictures_feed_a_model() -> None:
    model = SeeingModel().eval()
    images = [torch.rand(3, 4, 5) for _ in TEXTS]
    inputs = prepare_inputs((tokenizer(), TEXTS), (pictures, images))
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values"]
    assert torch.equal(inputs["input_ids"], IDS)
    states = model(**inputs).last_hidden_state
    assert states.shape == (3, 4, 32)
    # each row alone, without padding, is the same
    for row, length in enumerate((3, 1, 2)):
        one = prepare_inputs((tokenizer(), TEXTS[row : row + 1]), (pictures, images[row : row + 1]))
        alone = model(**one).last_hidden_state[0]
        torch.testing.assert_close(states[row, : length + 1], alone, atol=1e-5, rtol=1e-5)
    images[0].zero_()
    changed = model(**prepare_inputs((tokenizer(), TEXTS), (pictures, images))).last_hidden_state
    assert not torch.allclose(changed[0], states[0]) and torch.allclose(changed[1], states[1])


def test_texts_and_labels_feed_a_classifier() -> None:
    model = MyNewModelForSequenceClassification(MyNewModelConfig(**TINY)).eval()
    texts = tokenizer()(TEXTS, return_tensors="pt")
    labels = torch.tensor([0, 1, 1])
    out = model(**merge_model_inputs(texts, {"labels": labels, "return_dict": True}))
    mask = (IDS != 0).long()
    expected = nn.functional.cross_entropy(model(IDS, attention_mask=mask).logits, labels)
    torch.testing.assert_close(out.loss, expected)


def test_a_collision_names_the_key_unless_one_is_chosen() -> None:
    ids = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
    other = {"pixel_values": torch.rand(3, 3), "attention_mask": torch.ones(3, 1)}
    with pytest.raises(ValueError, match="'attention_mask' is in inputs 0 and 1; rename it"):
        merge_model_inputs(ids, other)
    for choice, winner in (("first", ids), ("last", other)):
        merged = merge_model_inputs(ids, other, on_conflict=choice)  # type: ignore[arg-type]
        assert merged["attention_mask"] is winner["attention_mask"]
        assert set(merged) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(ids) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match=r"on_conflict='merge'; allowed: \('raise', 'first'"):
        merge_model_inputs(ids, on_conflict="merge")  # type: ignore[arg-type]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "batch": (
        {"pixel_values": torch.rand(2, 3, 4)},
        ValueError,
        r"'pixel_values' is \(2, 3, 4\) and 'input_ids' \(3, 3\)",
    ),
    "no batch": ({"pixel_values": torch.tensor(1.0)}, ValueError, r"'pixel_values' is \(\)"),
    "positions": ({"position_ids": torch.ones(2, 3)}, ValueError, r"'position_ids' is \(2, 3\)"),
    "device": (
        {"pixel_values": torch.rand(3, 3, device="meta")},
        ValueError,
        "'pixel_values' is on meta and 'input_ids' on cpu",
    ),
    "dtype": (
        {"pixel_values": torch.rand(3, 3), "boxes": torch.rand(3, 4).half()},
        ValueError,
        "'pixel_values' is torch.float32, 'boxes' is torch.float16; cast them",
    ),
    "list": ({"pixel_values": [[1.0], [2.0]]}, TypeError, "'pixel_values' is a list"),
    "array": ({"pixel_values": np.ones((3, 3))}, TypeError, "'pixel_values' is a ndarray"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        merge_model_inputs({"input_ids": IDS}, given)


def test_what_has_no_batch_or_no_tensor_passes() -> None:
    given = {
        "position_ids": torch.arange(3)[None],
        "cu_seq_lens_q": torch.tensor([0, 3]),
        "num_items_in_batch": torch.tensor(6, device="meta"),
        "pixel_values": torch.rand(3, 3).half(),
        "labels": torch.rand(3),
        "use_cache": False,
        "past_key_values": None,
    }
    merged = merge_model_inputs({"input_ids": IDS}, given)
    assert merged.keys() == {"input_ids", *given}
    assert all(merged[key] is value for key, value in given.items())


@pytest.mark.parametrize("main", ["pixel_values", "use_cache", "number"])
def test_the_main_input_must_be_there(main: str) -> None:
    given = {"input_ids": IDS, "number": torch.tensor(1), "use_cache": True}
    with pytest.raises(ValueError, match=rf"main='{main}' must name .* \['input_ids', 'number'"):
        merge_model_inputs(given, main=main)
    images = {"pixel_values": torch.rand(2, 3)}
    assert merge_model_inputs(images, main="pixel_values") == images


def test_samples_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"given \[3, 1\] samples"):
        prepare_inputs((tokenizer(), TEXTS), (pictures, [torch.rand(3, 4, 5)]))
    with pytest.raises(TypeError, match="samples are one str; give a list"):
        prepare_inputs((tokenizer(), "a cat"))
