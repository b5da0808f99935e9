"""A patched model that moves to another dtype or device is proven there, or runs its own code."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.hf_around import BACKENDS, fully, step, training
from support.hf_patching import assert_equal, state, tiny, token_ids
from swathe.modeling.hf.patching import norms
from swathe.modeling.hf.patching import patch as engine
from swathe.modeling.hf.patching.patch import patch, unpatch
from swathe.modeling.hf.patching.swaps import is_fused


def report(model: Any) -> Any:
    """That of the last patch."""
    found = patch(model)
    assert "already" in found.note
    return found


def paths(model: Any, op: str) -> set[str]:
    return {row.path for row in report(model).patched if row.op == op}


@pytest.fixture
def wrong_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    own = norms.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = own(x, weight, *args, **kwargs)
        return y * 1.01 if weight.dtype == torch.bfloat16 else y

    monkeypatch.setattr(norms, "rms_norm", rms_norm)
    monkeypatch.setattr(engine, "_proofs", {})  # and what is found here is kept from others


@pytest.mark.parametrize("move", [nn.Module.bfloat16, lambda model: model.to(torch.bfloat16)])
def test_what_is_wrong_in_the_new_dtype_is_caught(
    move: Any, wrong_in_bf16: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("gemma3_text")
    patch(model, residual=False, rope=False)
    served = paths(model, "rms_norm")
    assert len(served) >= 9
    with caplog.at_level(logging.INFO):
        move(model)
    assert not paths(model, "rms_norm")
    assert not any(is_fused(type(model.get_submodule(path))) for path in served)
    assert {row.reason[:16] for row in report(model).left if row.op == "rms_norm"} == {
        "failed its proof"
    }
    # transformers says things of its own
    ours = [record for record in caplog.records if record.name.startswith("swathe")]
    lost, again = [record.getMessage() for record in ours]
    assert f"{len(served)} of its modules run their own forward again" in lost
    assert "failed its proof" in lost and "patched anew" in again
    assert paths(model, "gated_mlp_act")  # all else stays
    own = tiny("gemma3_text", torch.bfloat16)
    patch(own, rms_norm=False, residual=False, rope=False)
    assert torch.equal(model(token_ids()).logits, own(token_ids()).logits)
    model.float()
    assert paths(model, "rms_norm") == served


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_model_that_is_moved_is_one_that_was_loaded_there(model_type: str, backend: str) -> None:
    model, made = training(model_type), training(model_type, torch.bfloat16)
    fully(model, backend)
    fully(made, backend)
    model.to(torch.bfloat16)
    assert report(model).rows == report(made).rows
    assert [type(m) for m in model.modules()] == [type(m) for m in made.modules()]
    assert_equal(step(model), step(made), 0.0)
    unpatch(model)
    assert_equal(step(model), step(training(model_type, torch.bfloat16)), 0.0)


def test_there_and_back() -> None:
    model = tiny("llama")
    before = state(model)
    first = patch(model)
    was = {name: kind for name, (kind, _) in state(model).items()}
    model.double()
    assert patch(model).note  # it is still watched, though no kernel has fp64
    gold = tiny("llama").double()
    torch.testing.assert_close(model(token_ids()).logits, gold(token_ids()).logits)
    model.float()
    assert report(model).rows == first.rows
    assert {name: kind for name, (kind, _) in state(model).items()} == was
    unpatch(model)
    # tensors moved, and nothing else
    assert {n: kind for n, (kind, _) in state(model).items()} == {
        n: kind for n, (kind, _) in before.items()
    }
    assert "_apply" not in vars(model) and not engine.holders(model)


def test_moving_nowhere_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    patch(model)
    before = state(model)
    monkeypatch.setattr(engine, "FINDERS", (lambda *_: pytest.fail("nothing has changed"),))
    model.to("cpu").to(torch.float32).float().cpu()
    assert state(model) == before


@pytest.mark.parametrize("made", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_move_alone(made: Any) -> None:
    model = tiny("llama")
    patch(model)
    rows = report(model).rows
    other = made(model)
    other.bfloat16()
    assert other.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert report(model).rows == rows != report(other).rows
    unpatch(other)
    assert is_fused(type(model.model.norm)) and not is_fused(type(other.model.norm))


def test_a_part_of_another_module_moves_with_it() -> None:
    around = nn.ModuleDict({"inner": tiny("llama")})
    patch(around)
    around.bfloat16()
    made = nn.ModuleDict({"inner": tiny("llama", torch.bfloat16)})
    patch(made)
    kinds = [[type(m) for m in model.modules()] for model in (around, made)]
    assert kinds[0] == kinds[1]


def test_what_cannot_be_unpatched_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    patch(model)
    norm: Any = model.model.norm
    norm.__class__ = type("Sharded", (type(norm),), {})
    model.bfloat16()
    assert "not proven anew: cannot unpatch" in caplog.text
    assert model.dtype == torch.bfloat16
