"""Training steps of a patched model under checkpointing, autocast, torch.compile, accumulation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import swathe.hf
from support.hf_around import BACKENDS, MODELS, fully, gradients, step, training
from support.hf_patching import assert_as_good, assert_equal, checkpoint
from support.tiny_causal import batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_checkpointing(model_type: str, reentrant: bool, backend: str) -> None:
    own = step(training(model_type))
    for first in ("patch", "checkpoint"):
        model = training(model_type)
        if first == "patch":
            fully(model, backend)
        checkpoint(model, reentrant)
        if first == "checkpoint":
            fully(model, backend)
        checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert checkpointed
        assert_equal(step(model), own)


def test_checkpointing_recomputes_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from swathe.modeling.hf.patching import mlps

    calls = []
    real = mlps.gated_mlp_act

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    model = training("llama")
    fully(model)
    checkpoint(model, reentrant=False)
    monkeypatch.setattr(mlps, "gated_mlp_act", counted)
    step(model)
    assert len(calls) == 2 * 2  # of two layers, forward and again in backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", MODELS)
def test_autocast(model_type: str, backend: str) -> None:
    model = training(model_type)
    gold = step(copy.deepcopy(model).double())

    def cast(model: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model)

    own = cast(model)
    fully(model, backend)
    ours = cast(model)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in own.items()}
    # one draw of one rounding
    loss, theirs, exact = (float(found.pop("loss")) for found in (ours, own, gold))
    assert abs(loss - exact) <= 1.25 * abs(theirs - exact) + 2**-8 * exact
    assert_as_good(ours, own, gold)


@pytest.mark.parametrize("model_type", MODELS)
def test_bf16_with_fp32_norms(model_type: str) -> None:
    """Mixed precision as PEFT prepares it: norms stay in fp32."""
    model = training(model_type, torch.bfloat16)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float()
    plain = copy.deepcopy(model)
    swathe.hf.patch(model)
    for one in (model, plain):
        one.eval()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (one(batch()["input_ids"]).logits for one in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type, backend", [*((name, "auto") for name in MODELS), ("llama", "eager")]
)
def test_one_graph(model_type: str, backend: str) -> None:
    model = training(model_type, num_hidden_layers=1)
    own = step(model)
    logits = model.eval()(batch()["input_ids"], use_cache=False).logits
    fully(model, backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(batch()["input_ids"], use_cache=False).logits
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    model.train()
    assert_equal(step(compiled), own)


@pytest.mark.slow
def test_compiled_code_notices_a_patch() -> None:
    model = training("llama", num_hidden_layers=1)
    own = step(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    assert_equal(step(compiled), own)
    fully(model)
    assert_equal(step(compiled), own)
    assert counter.frame_count == 2
    swathe.hf.unpatch(model)
    assert_equal(step(compiled), own)
    assert counter.frame_count == 2  # the first serves again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_one_graph_by_inductor() -> None:
    model = training("qwen3", num_hidden_layers=1)
    own = step(model)
    fully(model)
    torch._dynamo.reset()
    assert_equal(step(torch.compile(model, fullgraph=True)), own)


def test_a_compiled_model_is_patched_inside() -> None:
    model = training("llama", num_hidden_layers=1)
    own = step(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    fully(compiled, "eager")
    assert_equal(step(compiled), own)
    swathe.hf.unpatch(compiled)
    assert_equal(step(compiled), own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_gradients(backend: str) -> None:
    """Two micro-batches with num_items_in_batch are one batch, as Trainer does it."""
    inputs = batch(4)
    items = (inputs["labels"][:, 1:] != -100).sum()

    def accumulated(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, 4)):
            part = {name: t[rows] for name, t in inputs.items()}
            model(**part, num_items_in_batch=items).loss.backward()
        return gradients(model)

    model = training("qwen3")
    whole = step(model, **inputs)
    del whole["loss"]
    own = accumulated(model)
    assert_equal(own, whole)
    fully(model, backend)
    assert_equal(accumulated(model), own)


def test_optimizer_steps() -> None:
    """The parameters after three steps of AdamW are those of the model that was not patched."""

    def trained(model: Any) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            step(model)
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    expected = trained(training("llama"))
    for backend in BACKENDS:
        model = training("llama")
        fully(model, backend)
        assert_equal(trained(model), expected, 1e-4)
