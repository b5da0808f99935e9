"""device_map: what goes where, and that a model on several devices moves what it must.

No machine here has two devices, so three things stand for them: "cpu" and "meta" in real loads,
a mocked inventory for "auto", and torch's fake tensors on devices "lazy:0" and "lazy:1", which
refuse an operation whose operands are not on one device, as a GPU does.
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
from swathe.kernels.core.registry import register_backend, registered
from swathe.modeling import devices
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.devices import place
from swathe.modeling.dispatch import dispatch_model
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM, LlamaModel
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
LAYER = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 74 + 2 * 64)
TABLE = 4 * 99 * 64
GPUS = [torch.device("lazy", 0), torch.device("lazy", 1)]
CPU, META = torch.device("cpu"), torch.device("meta")
SPREAD: dict[str, Any] = {
    "model.embed_tokens": GPUS[0],
    "model.layers.0": GPUS[0],
    "model.layers.1": "cpu",
    "model.layers.2": GPUS[1],
    "model.norm": GPUS[1],
    "lm_head": GPUS[1],
}


def build(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def on_meta(**changes: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        return build(**changes)


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
    ours = [registered(name)["eager"] for name, _ in OPS.values()]
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


def inventory(monkeypatch: pytest.MonkeyPatch, *room: int) -> None:
    """Pretend that there are GPUs with this much free memory; the last number is the CPU's."""
    free = dict(zip([*GPUS[: len(room) - 1], CPU], room, strict=True))
    monkeypatch.setattr(devices, "available_memory", lambda: free)


# where things go


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        CPU,
        {"": "cpu"},
        "auto",
        "sequential",
        {"model": "cpu", "lm_head": "cpu"},
        {"": "cpu", "model.layers.1": CPU},
    ],
)
def test_forms_that_mean_one_device(saved: Path, device_map: Any) -> None:
    expected = LlamaForCausalLM.from_pretrained(saved)
    model = LlamaForCausalLM.from_pretrained(saved, device_map=device_map, progress=False)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    assert set(model.hf_device_map.values()) == {"cpu"} and not model.is_dispatched()
    assert not any(m._forward_pre_hooks for m in model.modules()), "one device needs no hooks"
    assert not hasattr(expected, "hf_device_map")
    assert model.to("cpu") is model


def test_every_parameter_is_where_the_dict_says(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(
        saved, device_map={"": "cpu", "model.layers.2": "meta", "lm_head.weight": "meta"}
    )
    where = {name: p.device.type for name, p in model.named_parameters()}
    away = {name for name, kind in where.items() if kind == "meta"}
    assert away == {n for n in where if "layers.2." in n} | {"lm_head.weight"}
    assert model.hf_device_map == {"": "cpu", "model.layers.2": "meta", "lm_head.weight": "meta"}
    hidden = model.model.layers[0].input_layernorm.weight
    assert hidden.device == CPU and model.device == CPU


def test_weights_are_read_to_their_device(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved.extend(a for a in args if isinstance(a, torch.device))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    device_map = {"": "cpu", "lm_head": "meta"}
    LlamaForCausalLM.from_pretrained(saved, device_map=device_map, progress=False)
    assert moved.count(META) == 1 and moved.count(CPU) == 29


def test_auto_fills_in_order_and_merges_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta()
    inventory(monkeypatch, TABLE + LAYER, 2 * LAYER + 256, 10 * TABLE)
    found = place(model, "auto")
    assert found.modules == {
        "model.embed_tokens": GPUS[0],
        "model.layers.0": GPUS[0],
        "model.layers.1": GPUS[1],
        "model.layers.2": GPUS[1],
        "model.norm": GPUS[1],
        "lm_head": CPU,
    }
    assert found.main == GPUS[0] == found.device_of("model.rotary_emb.inv_freq")
    inventory(monkeypatch, TABLE, 4 * LAYER, 10 * TABLE)
    assert place(model, "auto").modules == {
        "model.embed_tokens": GPUS[0],
        "model.layers": GPUS[1],
        "model.norm": GPUS[1],
        "lm_head": GPUS[1],
    }
    inventory(monkeypatch, 10**6, 10**6)
    assert place(model, "auto").modules == {"": GPUS[0]}


def test_auto_never_goes_back_and_never_splits_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    # the norm would fit into what is left of the first device, and half a layer too
    inventory(monkeypatch, TABLE + LAYER + LAYER // 2, 3 * LAYER, 10 * TABLE)
    found = place(on_meta(), "auto")
    assert found.device_of("model.norm") == GPUS[1]
    for layer in range(3):
        names = ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
        assert len({found.device_of(f"model.layers.{layer}.{n}") for n in names}) == 1


def test_auto_counts_the_dtype_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta()
    inventory(monkeypatch, (2 * TABLE + 3 * LAYER) // 2 + 128, 1)
    assert place(model, "auto", dtype=torch.bfloat16).modules == {"": GPUS[0]}
    with pytest.raises(ValueError, match="give more in max_memory, or a smaller dtype"):
        place(model, "auto")


def test_auto_keeps_ties_together_and_counts_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(tie_word_embeddings=True)
    inventory(monkeypatch, TABLE + LAYER, 2 * LAYER + 256, 1)
    found = place(model, "auto")
    assert found.device_of("lm_head.weight") == GPUS[0] == found.device_of("model.embed_tokens")
    assert found.device_of("model.norm") == GPUS[1]


def test_max_memory(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    limits = {"cpu": "1MB", 1: f"{(TABLE + LAYER) / 1000}KB", 0: 0}
    found = place(on_meta(), "auto", limits)
    assert found.device_of("model.layers.0") == torch.device("cuda", 1)
    assert found.device_of("model.layers.1") == CPU
    assert found.as_hf() == {
        "model.embed_tokens": 1,
        "model.layers.0": 1,
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = LlamaForCausalLM.from_pretrained(
        saved, device_map="auto", max_memory={"cpu": "10GB"}, progress=False
    )
    assert model.hf_device_map == {"": "cpu"}


def test_free_memory_is_asked_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (1000 * (i + 1), 9999))
    found = devices.available_memory()
    assert list(found) == [torch.device("cuda", 0), torch.device("cuda", 1), CPU]
    assert list(found.values())[:2] == [900, 1800]
    assert found[CPU] > 10**8


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"models": "cpu"}, "match no module of LlamaForCausalLM: 'models'"),
        ({"model": "cpu"}, "parameters left over: 'lm_head.weight'"),
        ({"models": "cpu"}, "left over: 'model.embed_tokens.weight', .* and 10 more"),
        ({}, "places nothing"),
        ({"": "cpu", "model.layers.0.mlp": "meta"}, "splits 'model.layers.0', a DecoderLayer"),
        ({"": "cpu", "model.layers.0.mlp.up_proj.weight": "meta"}, "splits 'model.layers.0'"),
        ("disk", "names no device; allowed: a device such as 'cpu'"),
        ("Auto", "names no device"),
        ({"": "disk"}, "Weights are never kept on a disk"),
        ("cuda:7", "0 GPUs are visible; name one of those, or 'cpu'"),
        (3, "0 GPUs are visible"),
    ],
)
def test_maps_that_are_refused(
    device_map: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        place(on_meta(), device_map)


def test_ties_are_not_split() -> None:
    model = on_meta(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"'lm_head.weight' \(meta\) and 'model.embed_tokens"):
        place(model, {"": "cpu", "lm_head": "meta"})
    assert place(model, {"": "cpu", "model.layers.0": "meta"}).main == CPU


def test_budgets_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='max_memory goes with device_map="auto"'):
        place(on_meta(), "cpu", {"cpu": "1GB"})
    with pytest.raises(ValueError, match="'ten gigabytes'") as caught:
        place(on_meta(), "auto", {"cpu": "ten gigabytes"})
    assert caught.value.__notes__ == ["max_memory has 'cpu': 'ten gigabytes'"]
    inventory(monkeypatch, TABLE, TABLE)
    with pytest.raises(ValueError, match=r"'model.layers.0', of .*has no room left"):
        place(on_meta(), "auto")


# running on several devices


@pytest.mark.parametrize("tied", [False, True])
def test_forward_over_three_devices(lazy: None, tied: bool) -> None:
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
    model = dispatch_model(build(kernels="eager"), SPREAD)
    assert not model.lm_head._forward_pre_hooks, "the fused loss refuses a head with hooks"
    body = model.model(tokens().to(GPUS[0]))
    assert body.last_hidden_state.device == model.lm_head.weight.device == GPUS[1]


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
