"""Outputs beside transformers' own: fields, indexing, pytrees, pickling; nothing is lost."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_outputs as theirs
from torch import Tensor
from torch.utils import _pytree as pytree

from swathe.modeling import outputs as ours

CLASSES = [
    name
    for name, found in inspect.getmembers(ours, inspect.isclass)
    if issubclass(found, ours.ModelOutput) and found is not ours.ModelOutput
]
# transformers 5.24 shows what it called past_key_values before as `cache`
RENAMED = {"cache": "past_key_values"}


def pair(name: str = "CausalLMOutputWithPast") -> tuple[Any, Any]:
    """The same values in our class and theirs; one field is not set."""
    loss, logits, states = torch.tensor(2.0), torch.ones(1, 2), (torch.zeros(1), torch.ones(1))
    values = {"loss": loss, "logits": logits, "hidden_states": states}
    return getattr(ours, name)(**values), getattr(theirs, name)(**values)


def test_the_classes_are_those_of_the_heads() -> None:
    assert len(CLASSES) == 11


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_their_order(name: str) -> None:
    expected = [RENAMED.get(f.name, f.name) for f in fields(getattr(theirs, name))]
    assert [f.name for f in fields(getattr(ours, name))] == expected
    assert all(f.default is None for f in fields(getattr(ours, name)))


def test_indexing() -> None:
    mine, other = pair()
    assert list(mine) == list(other) == ["loss", "logits", "hidden_states"]
    assert len(mine) == len(other) and "logits" in mine and "attentions" not in mine
    assert mine[0] is mine.loss is mine["loss"] and mine[-1] is mine.hidden_states
    assert mine[:2] == (mine.loss, mine.logits) and mine[5:] == ()
    assert mine.to_tuple() == tuple(mine.values()) == tuple(v for _, v in mine.items())
    assert [type(v) for v in mine.to_tuple()] == [type(v) for v in other.to_tuple()]
    assert mine.attentions is None
    for index, error in (("attentions", KeyError), ("logit", KeyError), (3, IndexError)):
        for output in (mine, other):
            with pytest.raises(error):
                output[index]


def test_setting_and_never_deleting() -> None:
    mine, _ = pair()
    mine.attentions = (torch.ones(1),)
    mine["loss"] = None
    assert list(mine) == ["logits", "hidden_states", "attentions"]
    with pytest.raises(KeyError, match=r"has no field 'logit'; its fields are \['loss', 'logits'"):
        mine["logit"] = 1
    for refused in (
        lambda: mine.__delitem__("logits"),
        lambda: mine.pop("logits"),
        lambda: mine.update({"logits": 1}),
        lambda: mine.setdefault("loss", 1),
    ):
        with pytest.raises(TypeError, match="nothing can be deleted or popped; set a field"):
            refused()
    assert list(mine) == ["logits", "hidden_states", "attentions"]


@dataclass
class Three(ours.ModelOutput):
    """A class of one's own, as in transformers' tests; its first field has no default."""

    a: Any
    b: Any = None
    c: Any = None


def test_their_own_tests_of_a_model_output() -> None:
    """Counterparts of ModelOutputTester in transformers' tests/utils/test_model_output.py."""
    one, two, gap = Three(a=30), Three(a=30, b=10), Three(a=30, c=10)
    assert one.a == 30 and one.b is None and one.c is None
    with pytest.raises(AttributeError):
        one.d  # type: ignore[attr-defined]  # noqa: B018
    assert two[0] == 30 and two[1] == 10 and two[:2] == two[:] == (30, 10)
    assert gap[0] == 30 and gap[1] == 10 and gap[:2] == gap[:] == (30, 10)
    assert two["a"] == 30 and two["b"] == 10
    assert list(one) == list(one.keys()) == ["a"] and list(one.items()) == [("a", 30)]
    one.a = 10
    assert one["a"] == 10
    one["b"] = 5
    assert one.b == 5 and list(one) == ["a", "b"]
    names, first = two  # unpacking gives names, as iteration does
    assert (names, first) == ("a", "b")


def test_all_fields_in_one_argument() -> None:
    expected = Three(a=30, b=10)
    for given in ({"a": 30, "b": 10}, [("a", 30), ("b", 10)], iter([("a", 30), ["b", 10]])):
        assert Three(given) == expected
    assert Three(expected.items()) == expected
    assert Three(a=(30, 30)).a == (30, 30) and list(Three(a=())) == ["a"]
    assert Three("ab").a == "ab" and Three(a=[("x", 1)], b=2).a == [("x", 1)]
    with pytest.raises(ValueError, match=r"Three: \(10, 10\) stands among \(name, value\) pairs"):
        Three([("a", 30), (10, 10)])
    with pytest.raises(KeyError, match="has no field 'd'; its fields are"):
        Three({"d": 1})
    mine, _ = pair()
    again = type(mine)(mine.items())
    assert again.loss is mine.loss and list(again) == list(mine)


def test_a_program_that_returns_one_is_saved(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> ours.CausalLMOutputWithPast:
            return ours.CausalLMOutputWithPast(loss=x.sum(), logits=2 * x)

    x = torch.ones(3)
    torch.export.save(torch.export.export(Module(), (x,)), tmp_path / "program.pt2")
    found = torch.export.load(tmp_path / "program.pt2").module()(x)
    assert type(found) is ours.CausalLMOutputWithPast and torch.equal(found.logits, 2 * x)


@pytest.mark.parametrize("name", CLASSES)
def test_pytrees_pickles_and_copies(name: str) -> None:
    cls = getattr(ours, name)
    names = [f.name for f in fields(cls)]
    values = {n: torch.full((2,), float(i)) for i, n in enumerate(names)}
    values[names[-1]] = (torch.ones(1), torch.zeros(1))  # type: ignore[assignment]
    output = cls(**values)
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == len(names) + 1
    doubled = pytree.tree_map(lambda t: 2 * t, output)
    assert type(doubled) is cls and torch.equal(doubled[1], 2 * output[1])
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    keys = pytree.tree_flatten_with_path(output)[0]
    assert pytree.keystr(keys[0][0]) == f"['{names[0]}']"
    for copied in (again, pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(copied) is cls and list(copied) == list(output)
        assert torch.equal(copied[0], output[0]) and torch.equal(copied[-1][0], output[-1][0])
