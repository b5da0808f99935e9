"""Llama with its kernels in Triton, and with the fused head and loss: the same, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from support.tensors import DEVICE
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
from swathe.modeling.losses import causal_lm_loss, linear_causal_lm_loss

IDS = (torch.arange(22).view(2, 11) * 7 % 50).to(DEVICE)
LABELS = IDS.clone()
LABELS[0, :4] = -100


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(DEVICE)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # losses that differ from log(vocab_size)
    return model.train()


def step(model: Any, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(IDS, **{"labels": LABELS, **given}).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def agree(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
    for name, gradient in a[1].items():
        scale = b[1][name].abs().max().item()
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("op", ["norm", "rope", "mlp", "loss"])
def test_each_op_alone_changes_no_gradient(op: str) -> None:
    plain = build(kernels="eager")
    chosen = build(**{f"{op}_implementation": "triton"})
    agree(step(chosen), step(plain))
    report = {row.op: row.backend for row in chosen.kernel_report().rows}
    names = {"norm": "rms_norm", "rope": "rotary", "mlp": "gated_mlp_act"}
    assert op == "loss" or report[names[op]] == "triton"


def test_all_of_them_and_bf16() -> None:
    every = {f"{op}_implementation": "triton" for op in ("norm", "rope", "mlp", "loss")}
    agree(step(build(**every)), step(build(kernels="eager")))
    narrow, plain = build(**every).bfloat16(), build(kernels="eager").bfloat16()
    torch.testing.assert_close(step(narrow)[0], step(plain)[0].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_training_forms_no_logits_and_evaluation_does(tied: bool) -> None:
    model = build(loss_implementation="triton", tie_word_embeddings=tied)
    assert model(IDS, labels=LABELS).logits is None
    agree(step(model), step(build(kernels="eager", tie_word_embeddings=tied)))
    with torch.no_grad():
        evaluated = model.eval()(IDS, labels=LABELS)
    assert evaluated.logits is not None
    torch.testing.assert_close(evaluated.loss, causal_lm_loss(evaluated.logits, LABELS))
    assert model(IDS).logits is not None


def test_accumulated_batches_shifted_labels_and_nothing_to_learn() -> None:
    fused, plain = build(loss_implementation="triton"), build(kernels="eager")
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    for given in (
        {"num_items_in_batch": torch.tensor(40, device=DEVICE)},
        {"labels": None, "shift_labels": shifted},
    ):
        agree(step(fused, **given), step(plain, **given))
    loss, gradients = step(fused, labels=torch.full_like(LABELS, -100))
    assert loss == 0 and not any(g.any() for g in gradients.values())


def test_logits_that_are_kept_are_formed() -> None:
    fused, plain = build(loss_implementation="triton"), build(kernels="eager")
    last = {"logits_to_keep": 3, "shift_labels": LABELS[:, -3:]}
    mine, expected = (model.train()(IDS, **last) for model in (fused, plain))
    assert mine.logits.shape[1] == 3
    torch.testing.assert_close(mine.loss, expected.loss)
    for model in (fused, plain):
        with pytest.raises(ValueError, match=r"one a token \(and logits_to_keep=0\)"):
            model(IDS, labels=LABELS, logits_to_keep=3)


class Adapted(nn.Linear):
    """What an adapter makes of a head: the same class of layer, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def adapter(head: nn.Linear) -> nn.Module:
    return Adapted(head.in_features, head.out_features, bias=False)


def patched(head: nn.Linear) -> nn.Module:
    head.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, head)  # type: ignore[method-assign]
    return head


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, given, found: found * 2)
    return head


def watched(head: nn.Linear) -> nn.Module:
    head.register_full_backward_hook(lambda module, into, out: None)
    return head


REFUSED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "an adapter": (adapter, r"the head is a .*Adapted, not a plain torch.nn.Linear"),
    "a parametrization": (parametrizations.weight_norm, "ParametrizedLinear, not a plain"),
    "a patched forward": (patched, "the head has a forward that was replaced"),
    "a forward hook": (hooked, "the head has forward hooks"),
    "a backward hook": (watched, "the head has backward hooks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_does_more_is_refused(kind: str) -> None:
    change, message = REFUSED[kind]
    model = build(loss_implementation="triton")
    model.lm_head = change(model.lm_head)
    with pytest.raises(UnsupportedFeature, match=f"{message}.*loss_implementation=None"):
        model(IDS, labels=LABELS)
    model.config.loss_implementation = None
    assert model(IDS, labels=LABELS).loss.isfinite()


def test_hooks_on_all_modules_are_seen() -> None:
    model = build(loss_implementation="triton")
    handle = register_module_forward_hook(lambda module, given, found: None)
    try:
        with pytest.raises(UnsupportedFeature, match="hooks on all modules"):
            model(IDS, labels=LABELS)
    finally:
        handle.remove()
    assert model(IDS, labels=LABELS).loss.isfinite()


def test_labels_that_do_not_fit() -> None:
    head = nn.Linear(8, 50)
    with pytest.raises(ValueError, match=r"labels are \(2, 3\).*\(2, 4, 8\); labels need \(2, 4\)"):
        linear_causal_lm_loss(head, torch.ones(2, 4, 8), torch.ones(2, 3, dtype=torch.long))


def test_a_wrong_name_says_which_there_are() -> None:
    model = build(loss_implementation="trition")
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        model(IDS, labels=LABELS)
