"""Loading through weight transforms: streamed, strict, and refused by stored names."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swathe.modeling.checkpoint import progress, reader, report
from swathe.modeling.checkpoint.assembly import Assembly
from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.checkpoint.reader import Checkpoint, load_into
from swathe.modeling.checkpoint.report import LoadReport
from swathe.modeling.checkpoint.transforms import MOST_STACKED, WeightTransform, to_stored
from swathe.modeling.layers.moe import QWEN_MOE_TRANSFORMS

LEGACY = WeightTransform("norm.gamma", "norm.weight", legacy=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.empty(3, 8, 5))
        self.mlp.experts.down_proj = nn.Parameter(torch.empty(3, 5, 4))
        self.norm = nn.Linear(5, 1, bias=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(5, 7, bias=False)


TRANSFORMS = (*QWEN_MOE_TRANSFORMS, LEGACY)
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def on_meta(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    with torch.device("meta"):
        return kind()


def values(kind: Callable[[], nn.Module] = Net) -> dict[str, Tensor]:
    return {name: torch.randn(t.shape) for name, t in on_meta(kind).state_dict().items()}


def as_file(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds, each tensor with memory of its own."""
    stored = to_stored(expected, TRANSFORMS)
    return {name: t.contiguous().clone() for name, t in stored.items() if isinstance(t, Tensor)}


def written(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(directory)


def load(model: nn.Module, checkpoint: Checkpoint, **options: Any) -> LoadReport:
    options = {"dtype": None, "device": "cpu", "tied": {}, "prefix": "model"} | options
    return load_into(model, checkpoint, **{"transforms": TRANSFORMS, **options})


def assert_holds(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_load(tmp_path: Path) -> None:
    expected, model = values(), on_meta()
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    report = load(model, written(tmp_path, as_file(expected)), strict=True)
    assert_holds(model, expected)
    assert report.loaded == len(expected) and not report.missing and not report.unexpected
    assert report.converted["model.layers.1.mlp.experts.down_proj"] == [
        f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(3)
    ]
    assert "converted: 18 tensors to 4 parameters" in str(report)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, nn.Parameter) and experts.gate_up_proj.requires_grad
    assert not experts.down_proj.requires_grad


def test_body_alone_and_in_a_meta_context(tmp_path: Path) -> None:
    expected, model = values(), on_meta()
    body = {k.removeprefix("model."): v for k, v in expected.items() if k.startswith("model.")}
    checkpoint = written(tmp_path, as_file(body))
    with torch.device("meta"):
        report = load(model, checkpoint)
    assert report.missing == ["lm_head.weight"] and "added" in report.prefix
    assert_holds(model.model, body)

    base = on_meta().model
    report = load(base, written(tmp_path, as_file(expected)))
    assert report.unexpected == ["lm_head.weight"] and "removed" in report.prefix
    assert_holds(base, body)


def test_members_in_different_shards(tmp_path: Path) -> None:
    expected, model = values(), on_meta()
    files: list[dict[str, Tensor]] = [{}, {}, {}]
    for i, (name, tensor) in enumerate(sorted(as_file(expected).items())):
        files[i % 3][name] = tensor
    index = {}
    for i, tensors in enumerate(files):
        shard = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(tensors, tmp_path / shard, {"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    load(model, Checkpoint.open(tmp_path), strict=True)
    assert_holds(model, expected)


def test_one_stored_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, as_file(values()))
    alive: list[weakref.ref[Tensor]] = []
    original = Checkpoint.read

    def read(self: Checkpoint, name: str, room: Tensor | None = None) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = original(self, name, room)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    load(on_meta(), checkpoint, dtype=torch.bfloat16)
    assert len(alive) == len(checkpoint.tensors)


def test_casts(tmp_path: Path) -> None:
    expected, model = values(), on_meta()
    report = load(model, written(tmp_path, as_file(expected)), dtype=torch.bfloat16)
    assert_holds(model, {name: value.bfloat16() for name, value in expected.items()})
    assert set(report.cast) == set(expected)

    mixed = as_file(expected)
    mixed[UP] = mixed[UP].half()
    checkpoint = written(tmp_path, mixed)
    with pytest.raises(CheckpointError, match=r"E_DTYPE.*up_proj.weight' is float16(?s:.*)dtype"):
        load(on_meta(), checkpoint)
    model = on_meta()
    load(model, checkpoint, dtype=torch.float32)
    assert model.model.layers[1].mlp.experts.gate_up_proj[2, 5, 1] == mixed[UP][1, 1]


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = as_file(values())
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return tensors


REFUSED: dict[str, tuple[dict[str, Tensor | None], str, str]] = {
    "missing": ({UP: None}, "E_KEYS", f"missing '{UP}'"),
    "one too many": (
        {UP.replace(".2.", ".3."): torch.ones(4, 5)}, "E_KEYS", "unexpected 'model.layers.1.mlp"
    ),
    "leading zero": ({UP: None, UP.replace(".2.", ".02."): torch.ones(4, 5)}, "E_KEYS", "missing"),
    "shape": ({UP: torch.ones(5, 5)}, "E_SHAPE", f"'{UP}' in model.safetensors has shape (5, 5)"),
    "dtype": ({UP: torch.ones(4, 5, dtype=torch.int32)}, "E_DTYPE", f"'{UP}' in model.safetensors"),
    "not finite": ({UP: torch.full((4, 5), torch.inf)}, "E_NONFINITE", f"'{UP}' holds NaN or Inf"),
    "overflow": (
        {UP: torch.full((4, 5), 1e30)}, "E_OVERFLOW", f"'{UP}' (float32) has values beyond 65504"
    ),
    "both layouts": (
        {"model.layers.1.mlp.experts.gate_up_proj": torch.ones(3, 8, 5)}, "E_KEYS", "unexpected"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_stored_name_with_the_model_untouched(tmp_path: Path, what: str) -> None:
    changes, code, text = REFUSED[what]
    checkpoint, model = written(tmp_path, broken(**changes)), on_meta()
    with pytest.raises(CheckpointError) as caught:
        load(model, checkpoint, dtype=torch.float16)
    assert caught.value.code == code and text in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shapes_are_checked_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = written(tmp_path, broken(**{UP: torch.ones(4, 6)}))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(Assembly, "_allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match="E_SHAPE"):
        load(on_meta(), checkpoint)


@pytest.mark.parametrize("changes", [{UP: None}, {UP: torch.ones(4, 6)}])
def test_lenient_loads_leave_the_whole_parameter_out(tmp_path: Path, changes: Any) -> None:
    model = on_meta()
    report = load(model, written(tmp_path, broken(**changes)), strict=False)
    left = {name for name, p in model.named_parameters() if p.is_meta}
    assert left == {"model.layers.1.mlp.experts.gate_up_proj"}
    assert UP in report.missing or [name for name, *_ in report.mismatched] == [UP]
    assert len(report.unexpected) == 5 and left.isdisjoint(report.converted)


def test_files_that_hold_the_parameters_themselves(tmp_path: Path) -> None:
    expected = values()
    model = on_meta()
    report = load(model, written(tmp_path, expected), strict=True)
    assert_holds(model, expected)
    assert not report.converted
    body = {k.removeprefix("model."): v for k, v in expected.items() if k.startswith("model.")}
    model = on_meta()
    load(model, written(tmp_path, body))
    assert_holds(model.model, body)


def test_legacy_names_are_read_and_not_written(tmp_path: Path) -> None:
    expected = values()
    tensors = as_file(expected)
    assert "model.layers.0.norm.weight" in tensors
    tensors["model.layers.0.norm.gamma"] = tensors.pop("model.layers.0.norm.weight")
    model = on_meta()
    load(model, written(tmp_path, tensors), strict=True)
    assert_holds(model, expected)


def test_renamed_ends_of_a_tie(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)

    transforms = (WeightTransform("wte.weight", "embed.weight"),)
    options: dict[str, Any] = {
        "tied": {"head.weight": "embed.weight"},
        "prefix": "",
        "transforms": transforms,
        "strict": True,
    }
    weight = torch.randn(4, 3)
    model = on_meta(Tied)
    report = load(model, written(tmp_path, {"wte.weight": weight}), **options)
    assert report.tied == {"head.weight": "embed.weight"}
    assert model.head.weight is model.embed.weight and torch.equal(model.head.weight, weight)
    both = {"wte.weight": weight, "head.weight": weight + 1}
    with pytest.raises(CheckpointError, match="E_TIED"):
        load(on_meta(Tied), written(tmp_path, both), **options)


def test_a_hostile_number_of_experts_lists_no_names(tmp_path: Path) -> None:
    checkpoint, model = written(tmp_path, as_file(values())), on_meta()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.empty(MOST_STACKED + 1, 5, 4, device="meta"))
    with pytest.raises(CheckpointError, match=r"E_SHAPE(?s:.*)65537 stored tensors"):
        load(model, checkpoint, strict=False)


def test_many_problems_are_told_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of experts missing beside hundreds unexpected: only those shown are compared."""
    calls = []
    original = report.get_close_matches
    monkeypatch.setattr(
        report, "get_close_matches", lambda *a, **k: calls.append(a) or original(*a, **k)
    )
    tensors = {k.replace("up_proj", "upp"): v for k, v in as_file(values()).items()}
    tensors |= {f"model.layers.1.other.{i}": torch.ones(1) for i in range(300)}
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load(on_meta(), written(tmp_path, tensors))
    assert 0 < len(calls) <= 20


def test_progress_counts_stored_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[progress.Progress] = []

    class Recorded(progress.Progress):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(reader, "Progress", Recorded)
    checkpoint = written(tmp_path, as_file(values()))
    load(on_meta(), checkpoint)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert [(bar.done, bar.total) for bar in bars] == [(total, total)]
