"""The causal-LM loss of transformers models: lazy logits, and the loss function alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from support.tiny_causal import OWN, TINY, V, batch, loss_only, outcome, step, tiny, with_lora
from swathe.kernels.core import registry
from swathe.modeling.hf.patching.admission import chosen
from swathe.modeling.hf.patching.lazy_logits import LazyLogits

LAZY, REAL = "linear_cross_entropy", "cross_entropy"


def error(found: dict[str, Tensor], gold: dict[str, Tensor]) -> float:
    """rms over all parameters, each in units of its own size."""
    assert found.keys() == gold.keys()
    parts = [(found[n].double() - g).square().mean() / g.square().mean() for n, g in gold.items()]
    return float(torch.stack(parts).mean().sqrt())


@pytest.mark.parametrize("name", OWN)
def test_loss_and_gradients(name: str) -> None:
    model = tiny(name)
    _, gold = step(copy.deepcopy(model).double())
    loss, own = step(model)
    report = loss_only(model, backend="triton")
    assert outcome(report) == {LAZY: "patched"}, report
    output = model(**batch())
    ours, grads = step(model)
    assert isinstance(output.logits, LazyLogits) and output.logits.tensor is None
    torch.testing.assert_close(ours, loss, atol=2e-6, rtol=0)
    assert error(grads, gold) <= 1.25 * error(own, gold)
    if name == "mixtral":
        assert output.aux_loss is not None and output.aux_loss > 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bf16_is_no_less_exact(name: str) -> None:
    model = tiny(name, torch.bfloat16)
    wide = copy.deepcopy(model).double()
    gold_loss, gold = step(wide)
    loss, own = step(model)
    loss_only(model, backend="triton")
    ours, grads = step(model)
    assert ours.dtype == loss.dtype == torch.float32
    # what remains are the roundings of the body, which are the same
    assert error(grads, gold) <= 1.05 * error(own, gold)
    assert abs(ours - gold_loss) <= 1.25 * abs(loss - gold_loss) + 1e-3


class Shapes(TorchDispatchMode):
    """Counts tensors with a row of V for each of `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.full = tokens, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.dim() and t.shape[-1] == V:
                self.full += t.numel() >= self.tokens * V
        return result


def test_all_logits_never_exist() -> None:
    rows, columns = 2, 640  # more tokens than the largest chunk of a head so narrow
    model = tiny("llama", max_position_embeddings=columns, num_hidden_layers=1)
    inputs = batch(rows, columns)

    def full() -> int:
        with Shapes(rows * columns) as seen:
            model(**inputs).loss.backward()
        return seen.full

    assert full() > 1  # the spy sees them without the patch
    loss_only(model, backend="triton")
    assert full() == 0


def test_logits_are_there_for_whoever_reads_them() -> None:
    model = tiny("gemma2")
    expected = model(**batch()).logits
    loss_only(model)
    output = model(**batch())
    assert output["loss"] is output.loss
    assert output.logits.shape == expected.shape and output.logits.dtype == expected.dtype
    assert "not computed" in repr(output)
    assert torch.equal(output.logits[..., :-1, :].argmax(-1), expected[..., :-1, :].argmax(-1))
    assert torch.equal(output.logits.real(), expected)
    output.loss.backward()
    late = model(**batch())
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weight has changed since"):
        late.logits.softmax(-1)


def test_what_the_loss_is_asked_for() -> None:
    model, patched = tiny("llama"), tiny("llama")
    loss_only(patched)
    inputs = batch()
    shifted = torch.roll(inputs["labels"], -1, 1)
    cases: list[dict[str, Any]] = [
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": torch.tensor([7])},
        {"num_items_in_batch": 7},
        {"shift_labels": shifted},
        {"ignore_index": 5},
        {"labels": inputs["labels"].int().long()},
        {"logits_to_keep": 0},
    ]
    for case in cases:
        arguments = {**inputs, **case}
        if case.get("ignore_index"):
            arguments["labels"] = inputs["labels"].masked_fill(inputs["labels"] < 0, 5)
        ours, theirs = patched(**arguments), model(**arguments)
        torch.testing.assert_close(ours.loss, theirs.loss.reshape(()), atol=2e-6, rtol=0)
        assert ours.logits.tensor is None, case
    as_tuple = patched(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(model(**inputs, return_dict=False))
    assert isinstance(as_tuple[1], LazyLogits)
    labels = torch.full_like(inputs["labels"], -100)
    assert patched(inputs["input_ids"], labels=labels).loss == 0


def test_mistakes_raise_as_before() -> None:
    model, patched = tiny("llama"), tiny("llama")
    loss_only(patched)
    inputs = batch()
    wrong: list[dict[str, Any]] = [
        {"logits_to_keep": 2},
        {"labels": inputs["labels"][:, :4]},
    ]
    for case in wrong:
        texts = []
        for m in (model, patched):
            with pytest.raises(ValueError, match=r".+") as info:
                m(**{**inputs, **case})
            texts.append(str(info.value))
        assert texts[0] == texts[1]


def test_evaluation_and_generate_are_untouched() -> None:
    model, patched = tiny("llama"), tiny("llama")
    loss_only(patched)
    ids = batch()["input_ids"]
    assert torch.equal(patched(ids).logits, model(ids).logits)  # training, no labels
    for m in (model, patched):
        m.eval()
    ours, theirs = patched(**batch()), model(**batch())
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert patched._supports_logits_to_keep()
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(patched.generate(ids, **options), model.generate(ids, **options))


def test_tied_weights_get_both_gradients() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    _, own = step(model)
    report = loss_only(model)
    assert outcome(report) == {LAZY: "patched"}
    _, grads = step(model)
    assert "lm_head.weight" not in grads
    torch.testing.assert_close(grads, own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_on_the_head_is_called(when: str) -> None:
    loss, own = step(with_lora(tiny("llama")))
    model = tiny("llama")
    if when == "before":
        report = loss_only(with_lora(model))
        assert outcome(report) == {LAZY: "left", REAL: "patched"}
        assert "its head is a LoRA, which has to be called" in report.left[0].reason
    else:
        assert outcome(loss_only(model)) == {LAZY: "patched"}
        with_lora(model)
    ours, grads = step(model)
    torch.testing.assert_close(ours, loss, atol=2e-6, rtol=0)
    assert grads["lm_head.lora_B.weight"].any()
    torch.testing.assert_close(grads, own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_head_see_logits(when: str) -> None:
    model, seen = tiny("llama"), []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(type(output))

    if when == "before":
        model.lm_head.register_forward_hook(hook)
        report = loss_only(model)
        assert outcome(report) == {LAZY: "left", REAL: "patched"}
        assert "hooks" in report.left[0].reason
    else:
        loss_only(model)
        model.lm_head.register_forward_hook(hook)
    step(model)
    assert seen == [Tensor]


def test_a_forward_that_needs_the_logits_keeps_them() -> None:
    class Penalised(transformers.LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self, input_ids: Any = None, labels: Any = None, **kwargs: Any
        ) -> Any:
            output = self.model(input_ids)
            logits = self.lm_head(output.last_hidden_state)
            penalty = logits.logsumexp(-1).square().mean()
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            return CausalLMOutputWithPast(loss=loss + 0.1 * penalty, logits=logits)

    torch.manual_seed(0)
    model = Penalised(transformers.LlamaConfig(**TINY)).train()
    loss, own = step(model)
    report = loss_only(model)
    assert outcome(report) == {LAZY: "left", REAL: "patched"}
    assert report.left[0].reason == "its forward needs the logits themselves"
    ours, grads = step(model)
    torch.testing.assert_close(ours, loss, atol=2e-6, rtol=0)
    torch.testing.assert_close(grads, own, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_wrong_fails_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyLogits, "scale_and_softcap", lambda self: (1.0, None))
    model = tiny("gemma2", final_logit_softcapping=0.4)
    report = loss_only(model)
    assert outcome(report) == {LAZY: "left", REAL: "patched"}
    assert "times the error of the module's own" in report.left[0].reason


def test_the_loss_alone() -> None:
    for backend in ("auto", "cpp", "triton"):
        model = tiny("gemma2")
        loss, own = step(model)
        report = loss_only(model, cross_entropy=True, backend=backend)
        assert outcome(report) == {REAL: "patched"}
        assert report.rows[0].backend != "eager"
        ours, grads = step(model)
        torch.testing.assert_close(ours, loss, atol=2e-6, rtol=0)
        torch.testing.assert_close(grads, own, atol=1e-6, rtol=1e-4)
        output = model.eval()(**batch())
        assert type(output.logits) is Tensor
        torch.testing.assert_close(output.loss, loss, atol=2e-6, rtol=0)


def models_left_alone() -> Iterator[tuple[Any, str]]:
    custom = tiny("llama")
    custom.loss_function = lambda logits, labels, **_: logits.mean()
    yield custom, "its loss is <lambda>, not transformers' ForCausalLMLoss"
    bert: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.BertConfig(**bert, num_attention_heads=4, vocab_size=V)
    yield transformers.BertForMaskedLM(config), "does not call self.loss_function"
    sized = transformers.T5Config(vocab_size=V, d_model=32, d_ff=48, num_layers=1, num_heads=4)
    yield transformers.T5ForConditionalGeneration(sized), "does not call self.loss_function"


def test_other_losses_are_left_alone() -> None:
    for model, reason in models_left_alone():
        before = dict(vars(model))
        report = loss_only(model)
        assert not report.patched and reason in report.left[0].reason, report
        assert vars(model) == before


def test_every_reason_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        (row,) = loss_only(tiny("llama"), backend="auto").left
        # interpreted, Triton runs on a CPU as well, where it is named
        assert re.fullmatch(
            r"no fused backend serves it: triton runs on (cpu and )?cuda", row.reason
        )
    alone = {LAZY: {"eager": registry.registered(LAZY)["eager"]}}
    monkeypatch.setattr(registry, "_backends", alone)
    picked = registry.Choice(LAZY, "eager", print, frozenset(), "auto", {})
    _, reason = chosen(lambda _: picked, LAZY, "auto")
    assert reason == f"no fused backend serves it: {LAZY} has none"
