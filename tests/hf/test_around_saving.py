"""Copies, pickles and checkpoints of a patched model: only the first two know of the patch."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import swathe.hf
from support.hf_around import BACKENDS, MODELS, fully, step, training
from support.hf_patching import assert_equal
from swathe.modeling.hf.patching.patch import holders


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_copy_is_patched_and_on_its_own(
    model_type: str, copied: Callable[[Any], Any], backend: str
) -> None:
    own, plain = step(training(model_type)), training(model_type)
    model = training(model_type)
    report = fully(model, backend)
    made = copied(model)
    assert swathe.hf.patch(made).rows == report.rows  # as it is
    classes = [type(part) for part in model.modules()]
    assert [type(part) for part in made.modules()] == classes
    assert not {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
    assert_equal(step(made), own)
    swathe.hf.unpatch(made)
    assert not holders(made) and holders(model)
    assert [type(part) for part in made.modules()] == [type(part) for part in plain.modules()]
    assert [type(part) for part in model.modules()] == classes
    assert_equal(step(made), own)
    assert_equal(step(model), own)
    swathe.hf.unpatch(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", MODELS)
def test_the_checkpoint_never_knows(model_type: str, backend: str, tmp_path: Path) -> None:
    plain, model = training(model_type), training(model_type)
    fully(model, backend)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in files:
        ours, theirs = (tmp_path / which / name for which in ("patched", "plain"))
        if name.endswith(".safetensors"):
            a, b = load_file(ours), load_file(theirs)
            assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
        else:
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
            assert "swathe" not in ours.read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    assert not holders(loaded)
    assert_equal(step(loaded.train()), step(plain))


def test_state_dicts_go_both_ways() -> None:
    plain, model = training("llama"), training("llama")
    fully(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_equal(step(model), step(plain))
    fresh = training("llama")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_equal(step(fresh), step(plain))


def test_reload_where_swathe_is_not(tmp_path: Path) -> None:
    """save_pretrained, and torch.save of the state_dict: a process without swathe reads both."""
    model = training("llama")
    fully(model)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    script = f"""
import sys, torch
sys.modules["swathe"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
model.load_state_dict(torch.load({str(tmp_path / "state.pt")!r}, weights_only=True))
print(float(model(torch.arange(3, 9)[None]).logits.double().sum().detach()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = model.eval()(torch.arange(3, 9)[None]).logits.double().sum().item()
    assert float(run.stdout) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_dtype_and_device_moves(model_type: str) -> None:
    """A patched model may be cast: proofs were in another dtype, but the kernels are the same."""
    plain, model = training(model_type).double(), training(model_type)
    fully(model)
    # both compute the loss in fp32
    assert_equal(step(model.double()), step(plain), 1e-6)
    model.float()
    assert_equal(step(model), step(training(model_type)))


def test_embeddings_resized_after_the_patch() -> None:
    plain, model = training("llama"), training("llama")
    for backend in BACKENDS:
        swathe.hf.unpatch(model)
        fully(model, backend)
        for one in (plain, model):
            torch.manual_seed(5)
            one.resize_token_embeddings(80, mean_resizing=False)
        assert_equal(step(model), step(plain))
        plain, model = training("llama"), training("llama")
