"""Loading: values, prefixes, ties, casts, the report; what is loaded owns its memory."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swathe.modeling.checkpoint import progress
from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.checkpoint.reader import Checkpoint, load_into
from swathe.modeling.checkpoint.report import LoadReport

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 4)
        self.mlp = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("inv_freq", torch.zeros(2), persistent=False)


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(4, 11, bias=False)


TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Random values for every entry of a model's state_dict."""
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else torch.arange(t.numel())
        for name, t in model.state_dict().items()
    }


def stored(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(directory)


def on_meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind()


def load(model: nn.Module, checkpoint: Checkpoint, **options: Any) -> LoadReport:
    options = {"dtype": None, "device": "cpu", "tied": {}, "prefix": "model"} | options
    return load_into(model, checkpoint, **options)


def assert_holds(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_reads_every_dtype_as_safetensors_does(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES
    } | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7)}  # fmt: skip
    checkpoint = stored(tmp_path, tensors)
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_loads_every_entry(tmp_path: Path) -> None:
    expected, model = values(Headed()), on_meta(Headed)
    model.model.mlp.weight.requires_grad_(False)
    report = load(model, stored(tmp_path, expected), strict=True)
    assert_holds(model, expected)
    assert report.loaded == len(expected)
    assert report.as_dict() == {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    assert not model.model.mlp.weight.requires_grad and model.lm_head.weight.requires_grad


def test_works_inside_a_meta_context(tmp_path: Path) -> None:
    expected, model = values(Headed()), on_meta(Headed)
    checkpoint = stored(tmp_path, expected)
    with torch.device("meta"):
        load(model, checkpoint)
    assert_holds(model, expected)


def test_body_into_head_and_back(tmp_path: Path) -> None:
    body = values(Body())
    model = on_meta(Headed)
    report = load(model, stored(tmp_path, body))
    assert report.missing == ["lm_head.weight"] and model.lm_head.weight.is_meta
    assert torch.equal(model.model.mlp.weight, body["mlp.weight"])
    assert "added" in report.prefix

    full = values(Headed())
    base = on_meta(Body)
    report = load(base, stored(tmp_path, full))
    assert report.unexpected == ["lm_head.weight"] and not report.missing
    assert_holds(base, {name.removeprefix("model."): value for name, value in full.items()})


def test_strict_modes(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, values(Body()))
    with pytest.raises(
        CheckpointError, match=r"E_KEYS(?s:.*)missing 'lm_head.weight'(?s:.*)strict=False"
    ):
        load(on_meta(Headed), checkpoint, strict=True)
    assert load(on_meta(Headed), checkpoint, strict=True, ignore_missing=[r"lm_head"]).ignored == [
        "lm_head.weight"
    ]

    broken = values(Headed())
    del broken["model.mlp.bias"]
    broken["model.extra.weight"] = torch.ones(1)
    broken["lm_head.weight"] = torch.ones(12, 4)
    checkpoint = stored(tmp_path, broken)
    with pytest.raises(CheckpointError) as caught:
        load(on_meta(Headed), checkpoint)
    for expected in ("missing 'model.mlp.bias'", "unexpected 'model.extra.weight'", "(12, 4)"):
        assert expected in str(caught.value)
    model = on_meta(Headed)
    report = load(model, checkpoint, strict=False)
    assert report.as_dict() == {
        "missing_keys": {"model.mlp.bias"},
        "unexpected_keys": {"model.extra.weight"},
        "mismatched_keys": {("lm_head.weight", (12, 4), (11, 4))},
        "error_msgs": [],
    }
    assert model.lm_head.weight.is_meta and not model.model.mlp.weight.is_meta
    text = str(report)
    assert "model.mlp.bias" in text and "(12, 4) -> (11, 4)" in text


def test_mismatched_sizes_may_be_left(tmp_path: Path) -> None:
    wide = values(Headed()) | {"lm_head.weight": torch.ones(42, 4)}
    report = load(on_meta(Headed), stored(tmp_path, wide), ignore_mismatched_sizes=True)
    assert report.mismatched == [("lm_head.weight", (42, 4), (11, 4))]


def test_computed_and_named_extras_are_ignored(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.position_ids": torch.arange(3),
        "model.old": torch.ones(1),
    }
    checkpoint = stored(tmp_path, values(Headed()) | extra)
    report = load(on_meta(Headed), checkpoint, ignore_unexpected=[r"\.old$"], strict=True)
    assert set(report.ignored) == set(extra) and not report.unexpected


@pytest.mark.parametrize("drop", ["lm_head.weight", "model.embed_tokens.weight", None])
def test_ties(tmp_path: Path, drop: str | None) -> None:
    expected = values(Headed())
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"].clone()
    kept = {name: value for name, value in expected.items() if name != drop}
    model = on_meta(Headed)
    report = load(model, stored(tmp_path, kept), tied=TIED, strict=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_holds(model, expected)
    assert report.tied == TIED and not report.missing


def test_ties_that_differ(tmp_path: Path) -> None:
    model = on_meta(Headed)
    with pytest.raises(CheckpointError, match=r"E_TIED.*tie_word_embeddings") as caught:
        load(model, stored(tmp_path, values(Headed())), tied=TIED)
    assert caught.value.key == "lm_head.weight"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tie_whose_ends_are_both_missing(tmp_path: Path) -> None:
    kept = values(Headed())
    del kept["lm_head.weight"], kept["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"missing 'model.embed_tokens.weight'"):
        load(on_meta(Headed), stored(tmp_path, kept), tied=TIED)


def test_prefix_collision(tmp_path: Path) -> None:
    headed = {f"model.{name}": value for name, value in values(Body()).items()}
    checkpoint = stored(tmp_path, headed | {"mlp.bias": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"E_DUPKEY.*'mlp\.bias'.*prefix 'model\.' removed"):
        load(on_meta(Body), checkpoint)


def test_casts_are_reported_and_rounded_once(tmp_path: Path) -> None:
    expected, model = values(Headed()), on_meta(Headed)
    report = load(model, stored(tmp_path, expected), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"].bfloat16())
    assert model.model.steps.dtype == torch.int64
    assert report.cast["lm_head.weight"] == (torch.float32, torch.bfloat16)
    assert "model.steps" not in report.cast
    assert "float32 -> bfloat16" in str(report)
    with pytest.raises(ValueError, match=r"strict is 'yes'; allowed"):
        load(on_meta(Headed), Checkpoint.open(tmp_path), strict="yes")
    with pytest.raises(TypeError, match=r"dtype is torch.int8"):
        load(on_meta(Headed), Checkpoint.open(tmp_path), dtype=torch.int8)


def test_cast_that_overflows(tmp_path: Path) -> None:
    large = values(Headed()) | {"lm_head.weight": torch.full((11, 4), 1e6)}
    with pytest.raises(CheckpointError, match=r"E_OVERFLOW.*'lm_head.weight'.*65504.*float16"):
        load(on_meta(Headed), stored(tmp_path, large), dtype=torch.float16)


def test_nan_on_request(tmp_path: Path) -> None:
    odd = values(Headed()) | {"lm_head.weight": torch.full((11, 4), float("nan"))}
    model = on_meta(Headed)
    load(model, stored(tmp_path, odd), check_finite=False)
    assert model.lm_head.weight.isnan().all()


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    expected, model = values(Headed()), on_meta(Headed)
    load(model, stored(tmp_path, expected))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(0)  # memory mapped weights would now kill the process with SIGBUS
    assert_holds(model, expected)


def test_file_that_changes_before_reading(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, values(Headed()))
    save_file(values(Headed()), tmp_path / "model.safetensors")
    model = on_meta(Headed)
    with pytest.raises(CheckpointError, match=r"E_CHANGED.*model.safetensors"):
        load(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_problem_is_in_one_error(tmp_path: Path) -> None:
    bad = values(Headed()) | {
        "lm_head.weight": torch.ones(2, 2),
        "model.mlp.weight": torch.ones(4, 4, dtype=torch.int8),
    }
    with pytest.raises(CheckpointError) as caught:
        load(on_meta(Headed), stored(tmp_path, bad))
    assert "(2, 2)" in str(caught.value) and "int8" in str(caught.value)


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    weights = values(Body())
    save_file(weights, tmp_path / "blobs" / "b")
    (snapshot / "model.safetensors").symlink_to("../../blobs/b")
    checkpoint = Checkpoint.open(snapshot)
    assert torch.equal(checkpoint.read("mlp.bias"), weights["mlp.bias"])


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Checkpoint.open(tmp_path / "absent")
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="E_NOTDIR"):
        Checkpoint.open(path)


def test_one_stored_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stored(tmp_path, values(Headed()))
    alive: list[weakref.ref[Tensor]] = []
    original = Checkpoint.read

    def read(self: Checkpoint, name: str, room: Tensor | None = None) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = original(self, name, room)
        if tensor.is_floating_point():  # others are not cast and become the model's
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    load(on_meta(Headed), checkpoint, dtype=torch.bfloat16)
    assert len(alive) == len(checkpoint.tensors) - 1


def test_damaged_bytes_never_get_past_the_checks(tmp_path: Path) -> None:
    """Thousands of damaged headers: refused with the file's name, or harmless."""
    checkpoint = stored(tmp_path, values(Headed()))
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    header = min(info.offset for info in checkpoint.tensors.values())
    random = Random(5)
    refused = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(header)
            match random.randrange(3):
                case 0:
                    data[at] = random.randrange(256)
                case 1:
                    data[at] = random.choice(b'0123456789[]{},:"-FIU')
                case 2:
                    del data[at : at + random.randint(1, 9)]
        path.write_bytes(data)
        try:
            opened = Checkpoint.open(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert error.file == path and str(path) in str(error)
        else:
            assert sum(info.nbytes for info in opened.tensors.values()) == len(good) - header
            assert all(opened.read(n).shape == info.shape for n, info in opened.tensors.items())
    assert refused > 1500


PERTURBATIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "whole": lambda t: t,
    "missing": lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k},
    "unexpected": lambda t: t | {"model.more": torch.ones(2)},
    "renamed": lambda t: {k.replace("up_proj", "upper_proj"): v for k, v in t.items()},
    "mismatched": lambda t: t | {"lm_head.weight": torch.ones(40, 16)},
    "body only": lambda t: {
        k.removeprefix("model."): v for k, v in t.items() if k.startswith("model.")
    },
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_loading_info_is_what_transformers_reports(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    whole = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    checkpoint = stored(tmp_path, PERTURBATIONS[name](state))
    _, expected = LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert load(model, checkpoint, strict=False).as_dict() == {
        key: expected[key] if key == "error_msgs" else set(expected[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_slow_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stored(tmp_path, values(Headed()))
    load(on_meta(Headed), checkpoint)
    assert capsys.readouterr().err == ""

    quick = Terminal()
    monkeypatch.setattr("sys.stderr", quick)
    load(on_meta(Headed), checkpoint)
    assert quick.getvalue() == ""

    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    load(on_meta(Headed), checkpoint)
    assert quick.getvalue().startswith("\rloading [") and quick.getvalue().endswith("\n")
    assert "100%" in quick.getvalue()
    silent = Terminal()
    monkeypatch.setattr("sys.stderr", silent)
    load(on_meta(Headed), checkpoint, progress=False)
    assert silent.getvalue() == ""
