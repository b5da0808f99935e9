"""However a family is called, it is one model: ids or vectors, object or tuple, alone or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from support import tiny_bert
from support.families import FAMILIES, pair, tokens
from swathe.modeling.auto import model_class

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# every head of llama and bert, and the language model of each family
MODELS = [
    *FAMILIES,
    *(f"llama {head}" for head in ("base", "seq_cls", "token_cls", "question_answering")),
    *tiny_bert.HEADS,
]
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def build(which: str) -> Any:
    if which in tiny_bert.HEADS:
        return tiny_bert.pair(which)[1]
    family, _, head = which.partition(" ")
    model = pair(family, "eager", pad_token_id=0)[1]
    return model_class(family, head)(model.config).eval() if head else model


def labels_for(which: str, ids: Tensor) -> dict[str, Tensor]:
    if which.endswith(("question_answering", "QuestionAnswering")):
        return {"start_positions": ids[:, 0] % 11, "end_positions": ids[:, 1] % 11}
    one_a_row = which.endswith(("seq_cls", "SequenceClassification"))
    one_a_token = which.endswith(("token_cls", "TokenClassification"))
    if which.endswith(("base", "BertModel")):
        return {}
    return {"labels": ids[:, 0] % 2 if one_a_row else ids % 2 if one_a_token else ids}


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("which", MODELS)
def test_vectors_are_the_ids_they_are_of(which: str) -> None:
    model, ids = build(which), tokens()
    mask = torch.ones_like(ids)
    vectors = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask, **labels_for(which, ids))
    found = model(inputs_embeds=vectors, attention_mask=mask, **labels_for(which, ids))
    assert list(found) == list(expected) and len(tensors(expected)) > 0
    for mine, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("which", MODELS)
def test_a_tuple_is_what_the_object_holds(which: str) -> None:
    model, ids = build(which), tokens()
    given = {"attention_mask": torch.ones_like(ids), **labels_for(which, ids)}
    for asked in ({}, EVERYTHING):
        output = model(ids, **given, **asked)
        as_tuple = model(ids, **given, **asked, return_dict=False)
        assert type(as_tuple) is tuple and len(as_tuple) == len(output)
        for mine, other in zip(as_tuple, output.to_tuple(), strict=True):
            assert type(mine) is type(other)
            assert all(map(torch.equal, tensors(mine), tensors(other)))
    model.config.return_dict = False
    assert type(model(ids, **given)) is tuple
    model.config.output_hidden_states = True
    assert len(model(ids, **given)) == len(model(ids, **given, output_hidden_states=False)) + 1


@pytest.mark.parametrize("which", MODELS)
def test_a_row_is_the_same_alone_and_in_a_batch(which: str) -> None:
    model, ids = build(which), tokens(3)
    together = model(ids, attention_mask=torch.ones_like(ids), **EVERYTHING)
    for row in range(3):
        one = ids[row : row + 1]
        alone = model(one, attention_mask=torch.ones_like(one), **EVERYTHING)
        assert len(tensors(alone)) == len(tensors(together))
        for mine, other in zip(tensors(alone), tensors(together), strict=True):
            torch.testing.assert_close(mine[0], other[row], **CLOSE)


def test_the_older_name_of_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build("llama"), tokens()
    whole = model(ids).logits[:, 6:]
    for called in (model, model.model, model):
        cache = model(ids[:, :6]).past_key_values
        found = called(ids[:, 6:], past_key_value=cache)
        assert found.past_key_values is cache and cache.get_seq_length() == 11
        if called is model:
            torch.testing.assert_close(found.logits, whole, **CLOSE)
    told = [r.getMessage() for r in caplog.records if r.name.startswith("swathe.modeling.model")]
    assert (
        told
        == ["past_key_value is an older name of past_key_values, which is what it is read as"] * 2
    )
    with pytest.raises(
        TypeError, match=r"no argument 'past_key_value' .did you mean 'past_key_val"
    ):
        model(ids, past_key_value=None, past_key_values=None)
    with pytest.raises(TypeError, match="no argument 'past_key_value'"):
        build("BertForTokenClassification")(ids, past_key_value=None)
