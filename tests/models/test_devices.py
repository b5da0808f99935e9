"""device_map: what goes where, in each of its forms, and which maps are refused.

Where two devices are needed, "cpu" and "meta" stand for them in real loads, and a mocked inventory
for "auto"; test_dispatch.py runs models on several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swathe.modeling import devices
from swathe.modeling.devices import place
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

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


def build(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def on_meta(**changes: Any) -> Any:
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


def inventory(monkeypatch: pytest.MonkeyPatch, *room: int) -> None:
    """Pretend that there are GPUs with this much free memory; the last number is the CPU's."""
    free = dict(zip([*GPUS[: len(room) - 1], CPU], room, strict=True))
    monkeypatch.setattr(devices, "available_memory", lambda: free)


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


def test_angles_are_made_where_the_inputs_are() -> None:
    found = place(on_meta(), {"model.embed_tokens": "cpu", "": "meta"})
    assert found.main == CPU == found.device_of("model.rotary_emb.inv_freq")
    asked = {"model.embed_tokens": "cpu", "": "meta", "model.rotary_emb": "meta"}
    assert place(on_meta(), asked).device_of("model.rotary_emb.inv_freq") == META


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
