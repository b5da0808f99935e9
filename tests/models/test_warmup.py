"""warmup compiles and leaves the model, its gradients and the random state alone."""

from __future__ import annotations

import pytest
import torch

import swathe
from swathe.kernels.core.launch import Launcher
from swathe.modeling import decoder

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("training", [False, True, None])
def test_nothing_is_left_behind(training: bool | None) -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES))
    model.register_buffer("counter", torch.zeros(1))
    model.register_forward_hook(lambda m, *_: m.counter.add_(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    done = swathe.warmup(model, tokens=(1, 5), training=training)
    assert done.runs == 2 and "2 runs" in str(done)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_backward_runs_only_for_training() -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES)).eval()
    ran: list[str] = []
    model.lm_head.register_full_backward_hook(lambda *_: ran.append("backward"))
    swathe.warmup(model, tokens=(3,))
    assert not ran and not model.training
    swathe.warmup(model, tokens=(3,), training=True)
    assert ran == ["backward"] and not model.training


def test_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES)).eval()
    launcher = Launcher(object())
    model.register_forward_hook(lambda *_: launcher._compiled.update({len(ran): None}))
    ran: list[None] = []
    model.register_forward_hook(lambda *_: ran.append(None))
    # each length, and a step of decoding after it
    assert swathe.warmup(model, tokens=(1, 2, 3)).kernels == 6


def test_decoding_is_warmed_up_where_there_is_a_cache() -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES)).eval()
    ran: list[int] = []
    model.lm_head.register_forward_hook(lambda m, given, found: ran.append(found.shape[1]))
    swathe.warmup(model, tokens=(4, 7))
    assert ran == [4, 1, 7, 1]
    ran.clear()
    swathe.warmup(model, tokens=(4, 7), training=True)
    model.config.use_cache = False
    swathe.warmup(model, tokens=(4, 7))
    assert ran == [4, 7, 4, 7]


def test_a_fused_loss_is_run_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    real = decoder.linear_causal_lm_loss
    monkeypatch.setattr(
        decoder,
        "linear_causal_lm_loss",
        lambda head, hidden, *a, **k: (ran.append(hidden.shape[1]), real(head, hidden, *a, **k))[1],
    )
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES, loss_implementation="eager"))
    swathe.warmup(model, tokens=(1, 4))
    assert ran == [1, 4] and all(p.grad is None for p in model.parameters())
    swathe.warmup(model, tokens=(1, 4), training=False)
    assert ran == [1, 4]


def test_modules_keep_modes_of_their_own() -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES)).train()
    model.model.norm.eval()
    for training in (True, False):
        swathe.warmup(model, tokens=(2,), training=training)
        assert model.training and not model.model.norm.training


def test_a_frozen_model_warms_up() -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES)).requires_grad_(False)
    assert swathe.warmup(model, tokens=(2,), training=True).runs == 1


@pytest.mark.parametrize("tokens", [(), (0,), (4, -1)])
def test_lengths_are_checked(tokens: tuple[int, ...]) -> None:
    model = swathe.LlamaForCausalLM(swathe.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"warmup: tokens=.*lengths of 1 or more"):
        swathe.warmup(model, tokens=tokens)
