"""variant=: weights beside other weights, under transformers' names, and just as whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from support.families import TINY, tokens
from swathe.modeling.auto import AutoModelForCausalLM
from swathe.modeling.checkpoint import names as file_names
from swathe.modeling.checkpoint import writer
from swathe.modeling.checkpoint.errors import CheckpointError, CheckpointNotFound
from swathe.modeling.checkpoint.names import WeightFile
from swathe.modeling.checkpoint.reader import Checkpoint
from swathe.modeling.checkpoint.writer import save
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
from swathe.modeling.hub import needed

INDEX = "model.safetensors.index.fp16.json"
SHARDED = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def weights(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((4,), value), "b": torch.full((6,), value), "c": torch.tensor([value])}


def put(directory: Path, value: float, variant: str | None, size: int = 10**9) -> None:
    config = json.dumps({"model_type": "llama", "value": value})
    save(
        directory,
        config_json=config,
        tensors=weights(float(value)),
        max_shard_size=size,
        variant=variant,
    )


def value_of(directory: Path, variant: str | None) -> float:
    """The one value that all tensors have."""
    checkpoint = Checkpoint.open(directory, variant)
    values = {float(v) for name in checkpoint.tensors for v in checkpoint.read(name).unique()}
    assert checkpoint.tensors.keys() == weights(0).keys() and len(values) == 1, values
    return values.pop()


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_transformers_reads_ours_and_we_read_theirs(tmp_path: Path, size: str) -> None:
    ours = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    ours.save_pretrained(tmp_path / "ours", variant="fp16", max_shard_size=size)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", variant="fp16")
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits)
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size=size)
    own = {"generation_config.json"}
    assert names(tmp_path / "theirs") - own == names(tmp_path / "ours") - own
    for cls in (LlamaForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path / "theirs", variant="fp16")
        for name, value in ours.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(CheckpointNotFound, match=r"can be read with variant='fp16'$"):
        LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointNotFound, match=r"neither model\.bf16\.safetensors nor model"):
        LlamaForCausalLM.from_pretrained(tmp_path / "theirs", variant="bf16")


@pytest.mark.parametrize("first", [20, 10**9])
@pytest.mark.parametrize("then", [20, 40, 10**9])
def test_saving_again_leaves_nothing_stale_and_nobody_elses(
    tmp_path: Path, first: int, then: int
) -> None:
    others = (None, "ema", "fp16-2")
    for i, variant in enumerate(others):
        put(tmp_path, i, variant, first)
    before = names(tmp_path)
    put(tmp_path, 10, "fp16", first)
    put(tmp_path, 11, "fp16", then)
    fresh = tmp_path / "fresh"
    put(fresh, 11, "fp16", then)
    assert names(tmp_path) - {"fresh"} == before | names(fresh)
    assert [value_of(tmp_path, v) for v in (*others, "fp16")] == [0, 1, 2, 11]
    put(tmp_path, 12, None, then)
    assert [value_of(tmp_path, v) for v in (*others, "fp16")] == [12, 1, 2, 11]


def test_the_other_spelling_of_shards(tmp_path: Path) -> None:
    put(tmp_path, 1, "fp16", 40)
    index = json.loads((tmp_path / INDEX).read_text())
    for number, name in enumerate(SHARDED, 1):
        (tmp_path / name).rename(tmp_path / f"model-0000{number}-of-00002.fp16.safetensors")
    index["weight_map"] = {
        k: f"model-{v[11:25]}.fp16.safetensors" for k, v in index["weight_map"].items()
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    put(tmp_path, 2, None)
    assert [value_of(tmp_path, v) for v in (None, "fp16")] == [2, 1]
    put(tmp_path, 3, "fp16", 40)
    assert names(tmp_path) == {"config.json", "model.safetensors", INDEX, *SHARDED}


CALLS = ("replace", "link", "unlink", "fsync")
Killed = KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::swathe.modeling.checkpoint.errors.CheckpointWarning")
@pytest.mark.parametrize("old_size", [20, 10**9])
@pytest.mark.parametrize("new_size", [20, 40, 10**9])
def test_killed_anywhere_every_variant_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_size: int, new_size: int
) -> None:
    """And the next save, of whichever variant, loses none of them."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of saves, and no power cut
    # as after a kill: nothing is undone
    monkeypatch.setattr(writer._Save, "undo", lambda self: None)
    outcomes = set()
    for at in range(300):
        directory = tmp_path / str(at)
        put(directory, 1, "fp16", old_size)
        put(directory, 2, None, old_size)
        with monkeypatch.context() as patch:
            die_at(patch, at)
            try:
                put(directory, 3, "fp16", new_size)
                break
            except Killed:
                pass
        found = [value_of(directory, v) for v in ("fp16", None)]
        # while config.json names the new weights, both variants read them
        assert found in ([1, 2], [3, 3], [3, 2]), at
        outcomes.add(tuple(found))
        put(directory, 4, None, old_size)
        assert value_of(directory, None) == 4
        assert value_of(directory, "fp16") == found[0], at
        kept = {name for name in names(directory) if WeightFile.named(name)}
        assert not any(WeightFile.named(name).id for name in kept)  # type: ignore[union-attr]
    assert outcomes == {(1, 2), (3, 3), (3, 2)}


def die_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """Raise at the `at`-th call that touches the disk, before it or after it."""
    seen = [0]

    def step() -> None:
        seen[0] += 1
        if seen[0] == at + 1:
            raise Killed

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            step()
            result = call(*args, **kwargs)
            step()
            return result

        return wrapped

    for name in CALLS:
        patch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", (None, None)),
        ("model.safetensors.index.json", (None, None)),
        ("model-00001-of-00002.safetensors", (None, None)),
        ("model-0123456789ab.safetensors", (None, "0123456789ab")),
        ("model.fp16.safetensors", ("fp16", None)),
        ("model.safetensors.index.fp16.json", ("fp16", None)),
        ("model.non-ema-00001-of-00002.safetensors", ("non-ema", None)),
        ("model-00001-of-00002.fp16.safetensors", ("fp16", None)),
        ("model-0123456789ab.fp16-00001-of-00002.safetensors", ("fp16", "0123456789ab")),
        ("model-0123456789ab.fp16.safetensors.index.json", ("fp16", "0123456789ab")),
        (".config.json.0123456789ab.tmp", (None, "0123456789ab")),
        ("config.json", None),
        ("adapter_model.safetensors", None),
        ("model.safetensors.bak", None),
        ("pytorch_model.fp16.bin", None),
    ],
)
def test_what_a_file_name_says(name: str, expected: tuple[Any, ...] | None) -> None:
    found = WeightFile.named(name)
    assert found == (None if expected is None else WeightFile(*expected))


@pytest.mark.parametrize("variant", ["", "a/b", "..", "safetensors", "index", "x.y", "é", "a" * 65])
def test_a_variant_is_a_part_of_a_name(tmp_path: Path, variant: str) -> None:
    with pytest.raises(ValueError, match="must be None or a part of file names"):
        put(tmp_path / "new", 1, variant)
    assert not (tmp_path / "new").exists()
    put(tmp_path, 1, None)
    with pytest.raises(ValueError, match="must be None or a part of file names"):
        Checkpoint.open(tmp_path, variant)


def test_pickles_are_refused_and_say_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LlamaConfig(**TINY).to_json_string())
    torch.save({}, tmp_path / "pytorch_model.fp16.bin")
    convert = r"from_pretrained\(dir, variant='fp16'\).save_pretrained\(dir, variant='fp16'\)"
    with pytest.raises(CheckpointError, match=f"E_PICKLE.*unpickling can run code.*{convert}"):
        LlamaForCausalLM.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="use_safetensors=False is not supported: pickles are"):
        LlamaForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_downloads_are_of_the_variant() -> None:
    assert {*file_names.patterns()} <= {*needed()} and "config.json" in needed("fp16")
    assert file_names.patterns("fp16") == (
        "model.fp16.safetensors",
        "model.fp16-*.safetensors",
        "model-*.fp16.safetensors",
        INDEX,
    )
    assert len(set(needed())) == len(needed())


def test_names_of_another_layout_are_mapped(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    odd = {
        name.replace("model.layers.", "transformer.h.").replace("mlp.", "ffn."): value
        for name, value in model.state_dict().items()
    }
    save(tmp_path, config_json=model.config.to_json_string(), tensors=odd)
    mapping = {r"^transformer\.h\.": "model.layers.", r"\bffn\.(\w+)": r"mlp.\1"}
    for disable_mmap in (True, False):
        ours = LlamaForCausalLM.from_pretrained(
            tmp_path, key_mapping=mapping, disable_mmap=disable_mmap, use_safetensors=True
        )
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, key_mapping=mapping)
    for name, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(theirs.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match="E_ARCHITECTURE"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"E_DUPKEY.*the same name.*make its patterns narrow"):
        LlamaForCausalLM.from_pretrained(tmp_path, key_mapping={r"\.\d\.": ".0."})
    with pytest.raises(ValueError, match=r"key_mapping: '\(': '' is no pattern"):
        LlamaForCausalLM.from_pretrained(tmp_path, key_mapping={"(": ""})


def test_mapped_experts_are_merged(tmp_path: Path) -> None:
    from support.families import pair

    theirs, ours = pair("mixtral", "eager")
    theirs.save_pretrained(tmp_path / "a")
    checkpoint = Checkpoint.open(tmp_path / "a")
    odd = {k.replace("model.", "m."): checkpoint.read(k) for k in checkpoint.tensors}
    config = (tmp_path / "a" / "config.json").read_text()
    save(tmp_path / "b", config_json=config, tensors=odd)
    again = type(ours).from_pretrained(tmp_path / "b", key_mapping={r"^m\.": "model."})
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
