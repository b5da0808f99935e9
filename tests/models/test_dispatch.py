"""A model on several devices: it moves what it must, once, and refuses to be gathered.

No machine here has two devices. torch's fake tensors on devices "lazy:0" and "lazy:1" stand for
them, which refuse an operation whose operands are not on one device, as a GPU does; in real loads,
"cpu" and "meta" do.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import swathe
import swathe.kernels.linear_cross_entropy.api
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import register_backend, registered
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.dispatch import dispatch_model
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from swathe.modeling.generation import generate
from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.outputs import CausalLMOutputWithPast
from swathe.modeling.policy import OPS

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
GPUS = [torch.device("lazy", 0), torch.device("lazy", 1)]
CPU = torch.device("cpu")
SPREAD: dict[str, Any] = {
    "model.embed_tokens": GPUS[0],
    "model.layers.0": GPUS[0],
    "model.layers.1": "cpu",
    "model.layers.2": GPUS[1],
    "model.norm": GPUS[1],
    "lm_head": GPUS[1],
}


def build(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("model")
    build().save_pretrained(directory)
    return directory


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eager backends that also serve the devices "lazy", and fake tensors."""
    # what torch lacks for such devices: autocast, and a module that checkpoint asks for
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)
    ops = [*(name for name, _ in OPS.values()), "linear_cross_entropy"]
    ours = [registered(name)["eager"] for name in ops]
    for backend in ours:
        able = backend.capabilities
        more = dataclasses.replace(able, devices=able.devices | {"lazy"})
        register_backend(dataclasses.replace(backend, capabilities=more), replace=True)
    try:
        with FakeTensorMode():
            yield
    finally:
        for backend in ours:
            register_backend(backend, replace=True)


@pytest.mark.parametrize("tied", [False, True])
def test_forward_over_three_devices(
    lazy: None, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Tensor.__setitem__

    def setitem(self: Tensor, index: Any, value: Any) -> None:
        # a GPU takes indices of its own or of the CPU; fake tensors take any
        given = index if isinstance(index, tuple) else (index,)
        assert {i.device for i in given if isinstance(i, Tensor)} <= {self.device}
        original(self, index, value)

    monkeypatch.setattr(Tensor, "__setitem__", setitem)
    model = build(kernels="eager", tie_word_embeddings=tied)
    model = dispatch_model(model, {**SPREAD, **({"lm_head": GPUS[0]} if tied else {})})
    assert {p.device for p in model.parameters()} == {*GPUS, CPU}
    assert model.model.rotary_emb.inv_freq.device == GPUS[0]
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool).expand(2, 1, 7, 7)
    with torch.no_grad():
        out = model(tokens(), attention_mask=mask, output_hidden_states=True)
        cache = out.past_key_values
        assert isinstance(cache, DynamicCache)
        held = [layer.keys.device for layer in cache._layers if layer.keys is not None]
        assert held == [GPUS[0], CPU, GPUS[1]], "keys stay where they are computed"
        assert {t.device for t in (out.logits, *out.hidden_states)} == {GPUS[0]}
        assert model(tokens(2, 1), past_key_values=cache).logits.device == model.device
        static = StaticCache(model.config, 16)
        for length in (7, 1):
            model(tokens(2, length), past_key_values=static)
    assert [pair[0].device for pair in static._buffers if pair] == [GPUS[0], CPU, GPUS[1]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_over_three_devices(lazy: None, checkpointing: bool) -> None:
    model = dispatch_model(build(kernels="eager"), SPREAD).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"preserve_rng_state": False})
    model.enable_input_require_grads()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert loss.device == GPUS[0]
    loss.backward()
    assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())


def test_fused_loss_reads_the_head_where_it_is(lazy: None) -> None:
    model = dispatch_model(build(kernels="eager", loss_implementation="eager"), SPREAD)
    out = model.train()(tokens(), labels=tokens())
    assert out.logits is None and out.loss.device == GPUS[0]
    out.loss.backward()
    assert model.lm_head.weight.grad is not None
    assert not model.lm_head._forward_pre_hooks, "the fused loss refuses a head with hooks"
    body = model.model(tokens().to(GPUS[0]))
    assert body.last_hidden_state.device == model.lm_head.weight.device == GPUS[1]


def test_generation(lazy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # fake tensors have no values for the check of the prompt to look at
    monkeypatch.setattr(generate, "read_prompt", lambda model, ids, *_: Prompt.of(ids))
    model = dispatch_model(build(kernels="eager"), SPREAD)
    prompt = tokens().to(model.device)
    for kind in ("dynamic", "static"):
        new: Any = model.generate(
            prompt, max_new_tokens=3, eos_token_id=[], cache_implementation=kind
        )
        assert new.device == GPUS[0] and new.shape == (2, 10)


def test_a_body_alone(lazy: None) -> None:
    body = LlamaModel(LlamaConfig(**TINY, kernels="eager")).eval()
    where = {"": GPUS[1], "layers.0": GPUS[0], "embed_tokens": GPUS[0]}
    out = dispatch_model(body, where)(tokens())
    assert out.last_hidden_state.device == GPUS[0]


def test_without_hooks_it_would_not_run(lazy: None) -> None:
    model = dispatch_model(build(kernels="eager"), SPREAD)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match=r"weight is .* on cpu; x .* needs a .* on lazy:0"):
        model(tokens().to(GPUS[0]))


def test_a_boundary_costs_one_copy_of_mask_and_angles(
    lazy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kernels="eager", num_hidden_layers=6)
    half = {f"model.layers.{i}": GPUS[1] for i in range(2, 6)}
    dispatch_model(model, {"": GPUS[0], **half})
    copies: list[torch.device] = []
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies.extend(a for a in args if isinstance(a, torch.device) and a == GPUS[1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    with torch.no_grad():
        model(tokens(), attention_mask=mask, use_cache=False)
        # hidden, residual, cos, sin, and the mask; not once a layer
        assert len(copies) == 5
        model(tokens(), attention_mask=mask, use_cache=False)
        assert len(copies) == 10, "what is in the mask may have changed since"
    (start,) = model._forward_pre_hooks.values()
    del mask
    assert len(start.moves.made) == 0, "copies live no longer than their originals"


def test_real_values_pass_the_hooks(saved: Path) -> None:
    """The first two layers are real and the rest has no values, so what reaches it can be seen."""
    whole = LlamaForCausalLM.from_pretrained(saved)
    expected = whole(tokens(), output_hidden_states=True).hidden_states
    model = LlamaForCausalLM.from_pretrained(
        saved, device_map={"": "cpu", "model.layers.2": "meta", "model.norm": "meta"}
    )
    seen: list[Any] = []
    model.model.layers[2].register_forward_pre_hook(
        lambda module, args: seen.append(args), prepend=True
    )
    model(tokens(), use_cache=False)
    hidden, residual = seen[0][:2]
    assert torch.equal(hidden + residual, expected[2])


def test_kernels_are_chosen_for_each_device(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved, device_map={"": "cpu", "model.norm": "meta"})
    used = {row.module: row.backend for row in model.kernel_report().rows}
    on_cpu = LlamaForCausalLM.from_pretrained(saved).kernel_report().rows
    assert {r.module: r.backend for r in on_cpu if r.module != "model.norm"} == {
        k: v for k, v in used.items() if k != "model.norm"
    }
    assert used["model.norm"] == "eager", "meta is served by eager only"


def test_a_backend_that_cannot_turn_angles_is_refused_at_once(lazy: None) -> None:
    model = build(kernels="eager")
    model.to(CPU).set_kernels(rope="triton")
    asked = {"": CPU, "model.layers.2": GPUS[0], "model.norm": GPUS[0], "lm_head": GPUS[0]}
    with pytest.raises(UnsupportedFeature, match="rotary: backend 'triton' cannot serve"):
        dispatch_model(model, asked)


def test_a_model_on_several_devices_is_not_gathered(saved: Path) -> None:
    spread = {"": "cpu", "lm_head": "meta"}
    model = LlamaForCausalLM.from_pretrained(saved, device_map=spread)
    for call in (
        lambda: model.to("cpu"),
        lambda: model.to(torch.bfloat16).to(device=CPU),
        lambda: model.to(torch.empty(0)),
        lambda: model.cuda(),
        lambda: model.cpu(),
        lambda: dispatch_model(model, "cpu"),
    ):
        with pytest.raises(RuntimeError, match="You can't move a model that is spread over"):
            call()
    assert model.dtype == torch.bfloat16, "dtypes may change"
    assert model.float().dtype == torch.float32


def test_copies_and_pickles_keep_the_hooks(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved, device_map={"": "cpu", "lm_head": "meta"})
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again(tokens()).logits.shape == (2, 7, 99)
        assert again.is_dispatched() and again.model._forward_hooks


def test_a_dispatched_model_saves_whole(tmp_path: Path, saved: Path) -> None:
    model = swathe.dispatch_model(
        LlamaForCausalLM.from_pretrained(saved), {"model": "cpu", "lm_head": "cpu"}
    )
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_moving_keeps_parameters_and_ties() -> None:
    model = build(tie_word_embeddings=True)
    before: list[nn.Parameter] = list(model.parameters())
    dispatch_model(model, "cpu")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Classifier(LlamaPreTrainedModel):
    """A head without head_path, which looks at the ids before it calls a module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 2, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids).last_hidden_state
        logits = self.score((hidden * (input_ids != 0)[..., None]).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_other_heads_read_the_last_state_beside_the_ids(lazy: None) -> None:
    where = {**SPREAD, "score": "cpu"}
    del where["lm_head"]
    model = dispatch_model(Classifier(LlamaConfig(**TINY, kernels="eager")).eval(), where)
    labels = torch.zeros(2, dtype=torch.long)
    for out in (model(tokens(), labels=labels), model(tokens().to(GPUS[1]), labels.to(GPUS[1]))):
        assert out.logits.device == out.loss.device == GPUS[0]
