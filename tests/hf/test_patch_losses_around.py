"""A patched loss among copies, forwards and hooks of others, autocast and one graph."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from support.tiny_causal import V, batch, loss_only, outcome, step, tiny
from swathe.modeling.hf.patching.lazy_logits import LazyLogits
from swathe.modeling.hf.patching.patch import patch, unpatch


def test_unpatching_leaves_nothing() -> None:
    model = tiny("llama")
    head, before = model.lm_head, dict(vars(model))
    own = dict(vars(head))
    loss_only(model)
    assert "forward" in vars(model) and type(head) is not nn.Linear
    assert type(head).__name__ == "Linear" and isinstance(head, nn.Linear)
    unpatch(model)
    assert vars(model) == before and type(head) is nn.Linear and vars(head) == own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_model_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    loss_only(model)
    made = copied(model)
    with torch.no_grad():
        made.lm_head.weight.zero_()
    output = made(**batch())
    assert isinstance(output.logits, LazyLogits)
    torch.testing.assert_close(output.loss, torch.log(torch.tensor(float(V))))
    unpatch(made)
    assert type(made.lm_head) is nn.Linear and type(model.lm_head) is not nn.Linear
    assert isinstance(model(**batch()).logits, LazyLogits)


def hook(model: Any, calls: list[int]) -> None:
    """What accelerate's add_hook_to_module does to a module."""
    model._old_forward = model.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(
        functools.partial(new_forward, model), model._old_forward
    )


def test_under_forwards_that_others_have_put_there() -> None:
    """accelerate's device hooks before the patch, and its mixed precision after it."""
    expected = tiny("llama")(**batch()).loss
    hooked = tiny("llama")
    calls: list[int] = []
    hook(hooked, calls)
    before = dict(vars(hooked))
    loss_only(hooked)
    output = hooked(**batch())
    assert isinstance(output.logits, LazyLogits) and calls == [1]
    torch.testing.assert_close(output.loss, expected, atol=2e-6, rtol=0)
    unpatch(hooked)
    assert vars(hooked) == before

    wrapped = tiny("llama")
    loss_only(wrapped)
    own = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert isinstance(wrapped(**batch()).logits, LazyLogits)
    wrapped.forward = MethodType(own, wrapped)  # what accelerate's unwrap_model leaves
    torch.testing.assert_close(wrapped(**batch()).loss, expected, atol=2e-6, rtol=0)


def test_hooks_that_came_after_the_patch_outlive_it() -> None:
    model = tiny("llama")
    loss_only(model)
    calls: list[int] = []
    hook(model, calls)
    hooked = model.forward
    assert isinstance(model(**batch()).logits, LazyLogits) and calls == [1]
    unpatch(model)
    assert model.forward is hooked and model._old_forward == type(model).forward.__get__(model)
    assert type(model(**batch()).logits) is Tensor and calls == [1, 1]

    model = tiny("llama")
    hook(model, calls)
    loss_only(model)
    model.forward = vars(model).pop("_old_forward")  # remove_hook_from_module
    assert isinstance(model(**batch()).logits, LazyLogits)
    unpatch(model)
    assert model.forward == type(model).forward.__get__(model)
    assert "_old_forward" not in vars(model)


def test_replicas_of_data_parallel_run_their_own_forward() -> None:
    model = tiny("llama")
    loss_only(model)
    replica: Any = model._replicate_for_data_parallel()
    replica.model, replica.lm_head = model.model, model.lm_head
    assert type(replica(**batch()).logits) is Tensor
    assert isinstance(model(**batch()).logits, LazyLogits)
    unpatch(model)
    assert "_replicate_for_data_parallel" not in vars(model)


def test_a_head_behind_a_norm_that_is_patched_too() -> None:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=V,
        is_decoder=True,
    )
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, own = step(model)
    report = patch(model, backend="cpp", cross_entropy=True)
    assert outcome(report)["cross_entropy"] == "patched" and len(report.patched) > 1, report
    ours, grads = step(model)
    torch.testing.assert_close(ours, loss, atol=2e-6, rtol=0)
    torch.testing.assert_close(grads, own, atol=1e-5, rtol=1e-4)


def test_autocast() -> None:
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch())
    loss_only(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    assert output.logits.dtype == expected.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-2, rtol=0)
    assert torch.equal(output.logits.real(), expected.logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_graph(name: str) -> None:
    model = tiny(name)
    loss, own = step(model)
    loss_only(model)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    model.zero_grad()
    output = compiled(**batch(), use_cache=False)
    output.loss.backward()
    assert counter.frame_count == 1
    assert isinstance(output.logits, LazyLogits) and output.logits.tensor is None
    torch.testing.assert_close(output.loss, loss, atol=2e-6, rtol=0)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(grads, own, atol=1e-6, rtol=1e-4)
