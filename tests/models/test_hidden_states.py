"""Hidden states on request: all, one or some; in threads, under compile, in fewer layers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import support.tiny_bert as bert
from support.families import FAMILIES, pair, tokens

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CHOICES: list[Any] = [[0, 2], (1,), range(2), -1, 2, 1, [1, -1], [2, 2], [], True, False]
every_family = pytest.mark.parametrize("family", [*FAMILIES, "bert"])


def models(family: str, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights."""
    if family == "bert":
        return bert.pair("BertModel", **changes)
    return pair(family, **{"num_hidden_layers": 3, **changes})


def assert_same(mine: Any, other: Any) -> None:
    assert (mine is None) == (other is None)
    if mine is None:
        return
    assert len(mine) == len(other)
    assert [m is None for m in mine] == [o is None for o in other]
    for m, o in zip(mine, other, strict=True):
        if m is not None:
            torch.testing.assert_close(m, o, **CLOSE)


@every_family
@torch.no_grad()
def test_chosen_states_are_theirs(family: str) -> None:
    theirs, model = models(family)
    for chosen in CHOICES:
        given = list(chosen) if isinstance(chosen, tuple | range) else chosen
        expected = theirs(tokens(), output_hidden_states=given).hidden_states
        assert_same(model(tokens(), output_hidden_states=chosen).hidden_states, expected)


@every_family
@torch.no_grad()
def test_there_is_one_more_than_layers_and_the_last_is_the_result(family: str) -> None:
    _, model = models(family)
    body = model.base_model
    out = body(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    first = body(tokens(), output_hidden_states=0).hidden_states  # in transformers 0 is False
    assert torch.equal(first[0], out.hidden_states[0]) and set(map(type, first[1:])) == {type(None)}


@pytest.mark.parametrize("wrong", ["x", 4, -5, [0, 4], [True], ["0"], 1.5, {0: 1}])
def test_indices_that_there_are_not(wrong: Any) -> None:
    _, model = models("llama")
    with pytest.raises(ValueError, match=r"have 4 hidden states; allowed are True, False, an ind"):
        model(tokens(), output_hidden_states=wrong)


def test_threads_with_different_choices_do_not_mix() -> None:
    _, model = models("llama")
    asked: list[Any] = [True, [0, 2], None, -1]
    ids = [tokens(1 + n, 5 + n, seed=n) for n in range(len(asked))]

    def states(n: int) -> Any:
        with torch.no_grad():
            return model(ids[n], output_hidden_states=asked[n]).hidden_states

    expected = [states(n) for n in range(len(asked))]
    failures: list[Any] = []

    def work(n: int) -> None:
        for _ in range(10):
            found = states(n)
            same = found is None and expected[n] is None
            if not same and not all(
                a is b is None or torch.equal(a, b) for a, b in zip(found, expected[n], strict=True)
            ):
                failures.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "bert"])
@pytest.mark.parametrize("chosen", [True, [0, 2]])
def test_compiled_they_are_the_same(family: str, chosen: Any) -> None:
    _, model = models(family, num_hidden_layers=2)
    body = model.base_model
    given = {"output_hidden_states": chosen, **({} if family == "bert" else {"use_cache": False})}
    torch.compiler.reset()
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    assert_same(compiled(tokens(), **given).hidden_states, body(tokens(), **given).hidden_states)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
@torch.no_grad()
def test_a_configuration_with_fewer_layers_runs_the_first(family: str) -> None:
    theirs, model = models(family)
    theirs.config.num_hidden_layers = model.config.num_hidden_layers = 1
    expected = theirs(tokens(), output_hidden_states=True)
    out = model(tokens(), output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    assert_same(out.hidden_states, expected.hidden_states)


def test_chosen_states_take_gradients() -> None:
    _, model = models("llama")
    states = model(tokens(), output_hidden_states=[0, 3]).hidden_states
    kept: list[Tensor] = [state for state in states if state is not None]
    for state in kept:
        state.retain_grad()
    kept[1].sum().backward()
    assert len(kept) == 2 and all(state.grad is not None for state in kept)
