"""Hostile and damaged checkpoint directories: each gets one clear error, fast, and loads nothing.

Transformers loads 20 of the 83 that a survey tried.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from swathe.modeling.checkpoint.errors import CheckpointError, CheckpointWarning
from swathe.modeling.checkpoint.reader import Checkpoint, load_into

TIME_LIMIT_S = 20.0
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = {"up.weight": torch.randn(4, 3), "down.weight": torch.randn(3, 4)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4, bias=False)
        self.down = nn.Linear(4, 3, bias=False)


def single(directory: Path, **changes: torch.Tensor) -> Path:
    save_file({**WEIGHTS, **changes}, directory / "model.safetensors", {"format": "pt"})
    return directory / "model.safetensors"


def sharded(directory: Path, index: Any = None) -> None:
    save_file({"up.weight": WEIGHTS["up.weight"]}, directory / A, {"format": "pt"})
    save_file({"down.weight": WEIGHTS["down.weight"]}, directory / B, {"format": "pt"})
    weight_map = {"up.weight": A, "down.weight": B}
    text = json.dumps({"metadata": {}, "weight_map": weight_map} if index is None else index)
    (directory / INDEX).write_text(text)


def raw(directory: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A model.safetensors with any header text, any data and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    blob = claimed.to_bytes(8, "little") + text + data
    (directory / "model.safetensors").write_bytes(blob)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def remap(directory: Path, shard: Any) -> None:
    sharded(directory, {"weight_map": {"up.weight": shard, "down.weight": B}})


def outside(directory: Path) -> Path:
    """A valid weights file beside the checkpoint, where nothing may read."""
    target = directory.parent / "outside"
    target.mkdir()
    save_file({"up.weight": torch.full((4, 3), 7.0)}, target / "evil.safetensors")
    return target / "evil.safetensors"


def traversal(d: Path) -> None:
    outside(d)
    remap(d, "../outside/evil.safetensors")


def link_out(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    (d / A).symlink_to(outside(d))


def link_single_out(d: Path) -> None:
    (d / "model.safetensors").symlink_to(outside(d))


def link_index_out(d: Path) -> None:
    sharded(d)
    (d / INDEX).rename(d.parent / "index.json")
    (d / INDEX).symlink_to(d.parent / "index.json")


def link_loop(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    (d / A).symlink_to(A)


def link_to_device(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    (d / A).symlink_to("/dev/zero")


def fake_cache(d: Path) -> None:
    """Only snapshots/<revision> may reach blobs; a folder that is merely called blobs may not."""
    blobs = d.parent / "blobs"
    blobs.mkdir()
    save_file(WEIGHTS, blobs / "b")
    (d / "model.safetensors").symlink_to(blobs / "b")


def fifo_shard(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    os.mkfifo(d / A)


def folder_shard(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    (d / A).mkdir()


def both_layouts(d: Path) -> None:
    single(d)
    sharded(d)


def missing_shards(d: Path) -> None:
    sharded(d)
    (d / A).unlink()
    (d / B).unlink()


def duplicate_tensor(d: Path) -> None:
    sharded(d)
    save_file({"down.weight": WEIGHTS["down.weight"], "up.weight": torch.full((4, 3), 7.0)}, d / B)


def cut(d: Path, keep: int | float) -> None:
    path = single(d)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])


def pickled(d: Path, name: str) -> None:
    (d / name).write_bytes(pickle.dumps({"up.weight": [1.0]}))


def torch_archive(d: Path) -> None:
    torch.save(WEIGHTS, d / "model.safetensors")


def pointer(d: Path, name: Any) -> None:
    single(d)
    (d / "config.json").write_text(json.dumps({"transformers_weights": name}))


def big_header(d: Path) -> None:
    with (d / "model.safetensors").open("wb") as file:
        file.write((120_000_000).to_bytes(8, "little"))
        file.truncate(120_000_100)  # sparse


def big_index(d: Path) -> None:
    sharded(d)
    with (d / INDEX).open("r+b") as file:
        file.truncate(65 * 2**20)


_ONE = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = b"{%b,%b}" % (_ONE, _ONE)
MAP_TWICE = b'{"weight_map":{"up.weight":"a.safetensors","up.weight":"b.safetensors"}}'
NESTED = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

Attack = Callable[[Path], Any]
# name: (attack, code, what the message must name)
STRUCTURE: dict[str, tuple[Attack, str, str]] = {
    "path traversal": (traversal, "E_PATH", "../outside/evil.safetensors"),
    "absolute path": (lambda d: remap(d, str(outside(d))), "E_PATH", "evil.safetensors"),
    "backslash path": (lambda d: remap(d, "..\\evil.safetensors"), "E_PATH", "evil"),
    "drive": (lambda d: remap(d, "C:evil.safetensors"), "E_PATH", "C:evil"),
    "NUL in a name": (lambda d: remap(d, "a\0.safetensors"), "E_PATH", r"\x00"),
    "terminal escape in a name": (lambda d: remap(d, "\x1b[2J.safetensors"), "E_PATH", r"\x1b"),
    "dot dot": (lambda d: remap(d, ".."), "E_PATH", "'..'"),
    "empty name": (lambda d: remap(d, ""), "E_PATH", "''"),
    "very long name": (lambda d: remap(d, "a" * 300 + ".safetensors"), "E_PATH", "aaa"),
    "link out of the directory": (link_out, "E_PATH", A),
    "single file links out": (link_single_out, "E_PATH", "model.safetensors"),
    "index links out": (link_index_out, "E_PATH", INDEX),
    "link loop": (link_loop, "E_PATH", A),
    "blobs without snapshots": (fake_cache, "E_PATH", "model.safetensors"),
    "link to /dev/zero": (link_to_device, "E_PATH", A),
    "map to /dev/zero": (lambda d: remap(d, "/dev/zero"), "E_PATH", "/dev/zero"),
    "shard is a FIFO": (fifo_shard, "E_NOTFILE", A),
    "shard is a folder": (folder_shard, "E_NOTFILE", A),
    "weights are a FIFO": (lambda d: os.mkfifo(d / "model.safetensors"), "E_NOTFILE", "model.s"),
    "index is a FIFO": (lambda d: os.mkfifo(d / INDEX), "E_NOTFILE", INDEX),
    "config is a FIFO": (lambda d: os.mkfifo(d / "config.json"), "E_NOTFILE", "config.json"),
    "shard name is a number": (lambda d: remap(d, 7), "E_INDEX", "7"),
    "no weight_map": (lambda d: sharded(d, {"metadata": {}}), "E_INDEX", "weight_map"),
    "weight_map is a list": (lambda d: sharded(d, {"weight_map": [1]}), "E_INDEX", "weight_map"),
    "weight_map is empty": (lambda d: sharded(d, {"weight_map": {}}), "E_INDEX", "weight_map"),
    "index is a list": (lambda d: sharded(d, []), "E_INDEX", INDEX),
    "index is truncated": (lambda d: (d / INDEX).write_text('{"weight'), "E_INDEX", INDEX),
    "index is not UTF-8": (lambda d: (d / INDEX).write_bytes(b'{"\xff'), "E_INDEX", INDEX),
    "index is nested": (lambda d: (d / INDEX).write_bytes(NESTED), "E_INDEX", "deep"),
    "index is huge": (big_index, "E_INDEX", INDEX),
    "index repeats a key": (lambda d: (d / INDEX).write_bytes(MAP_TWICE), "E_INDEX", "up.weight"),
    "shards are pickles": (lambda d: remap(d, "pytorch_model.bin"), "E_PICKLE", "pytorch_model"),
    "shards are text": (lambda d: remap(d, "weights.txt"), "E_INDEX", "weights.txt"),
    "key dropped from the index": (
        lambda d: sharded(d, {"weight_map": {"up.weight": A, "x": B}}), "E_INDEX_MISMATCH", "x"),
    "key at the wrong shard": (
        lambda d: sharded(d, {"weight_map": {"up.weight": B, "down.weight": A}}),
        "E_INDEX_MISMATCH", "up.weight"),
    "tensor in two shards": (duplicate_tensor, "E_DUPKEY", "up.weight"),
    "both layouts": (both_layouts, "E_AMBIGUOUS", "delete"),
    "missing shards": (missing_shards, "E_MISSING_SHARD", B),
    "nothing there": (lambda d: (d / "README.md").touch(), "E_MISSING_FILE", "README.md"),
    "dangling link": (
        lambda d: (d / "model.safetensors").symlink_to("gone"), "E_MISSING_FILE", "model.saf"),
    "only a pickle": (lambda d: pickled(d, "pytorch_model.bin"), "E_PICKLE", "save_pretrained"),
    "renamed pickle": (lambda d: pickled(d, "model.safetensors"), "E_PICKLE", "pickle"),
    "renamed torch archive": (torch_archive, "E_PICKLE", "archive"),
    "Git LFS pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/x"),
        "E_SAFETENSORS", "git lfs pull"),
    "GGUF": (
        lambda d: (d / "model.safetensors").write_bytes(b"GGUF\3\0\0\0" * 9),
        "E_SAFETENSORS", "GGUF"),
    "empty file": (lambda d: (d / "model.safetensors").touch(), "E_SAFETENSORS", "0 bytes"),
    "truncated length": (lambda d: cut(d, 5), "E_SAFETENSORS", "5 bytes"),
    "truncated header": (lambda d: cut(d, 40), "E_SAFETENSORS", "truncated"),
    "truncated data": (lambda d: cut(d, 0.9), "E_SAFETENSORS", "truncated"),
    "header length 2^63": (
        lambda d: raw(d, {"w": entry()}, bytes(8), length=2**63), "E_SAFETENSORS", "claims"),
    "header of 120 MB": (big_header, "E_SAFETENSORS", "claims"),
    "header is not JSON": (lambda d: raw(d, b"{nonsense}"), "E_SAFETENSORS", "JSON"),
    "header is not UTF-8": (lambda d: raw(d, b'{"\xff":1}'), "E_SAFETENSORS", "JSON"),
    "header is a list": (lambda d: raw(d, [1]), "E_SAFETENSORS", "list"),
    "header is nested": (lambda d: raw(d, NESTED), "E_SAFETENSORS", "deep"),
    "header has NaN": (lambda d: raw(d, b'{"w":NaN}'), "E_SAFETENSORS", "NaN"),
    "header repeats a name": (lambda d: raw(d, TWICE, bytes(4)), "E_SAFETENSORS", "twice"),
    "entry is a number": (lambda d: raw(d, {"w": 3}), "E_SAFETENSORS", "'w'"),
    "entry lacks offsets": (
        lambda d: raw(d, {"w": {"dtype": "F32", "shape": [2]}}), "E_SAFETENSORS", "data_offsets"),
    "unknown dtype": (lambda d: raw(d, {"w": entry("Q4")}, bytes(8)), "E_DTYPE", "'Q4'"),
    "dtype is a list": (lambda d: raw(d, {"w": entry(["F32"])}, bytes(8)), "E_DTYPE", "'w'"),
    "negative size": (lambda d: raw(d, {"w": entry(shape=[-2])}, bytes(8)), "E_SAFETENSORS", "-2"),
    "size is true": (lambda d: raw(d, {"w": entry(shape=[True])}), "E_SAFETENSORS", "True"),
    "fractional size": (lambda d: raw(d, {"w": entry(shape=[2.0])}), "E_SAFETENSORS", "2.0"),
    "shape overflows": (
        lambda d: raw(d, {"w": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
        "E_SAFETENSORS", "more bytes than can exist"),
    "very many dimensions": (
        lambda d: raw(d, {"w": entry(shape=[1] * 99)}, bytes(4)), "E_SAFETENSORS", "shape"),
    "offsets do not fit the shape": (
        lambda d: raw(d, {"w": entry(shape=[3])}, bytes(8)), "E_SAFETENSORS", "takes 12 bytes"),
    "offsets backwards": (
        lambda d: raw(d, {"w": entry(offsets=[8, 0])}, bytes(8)), "E_SAFETENSORS", "[8, 0]"),
    "overlap": (
        lambda d: raw(d, {"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)),
        "E_SAFETENSORS", "overlaps"),
    "hole": (
        lambda d: raw(d, {"v": entry(), "w": entry(offsets=[16, 24])}, bytes(24)),
        "E_SAFETENSORS", "unused"),
    "past the end": (
        lambda d: raw(d, {"w": entry(shape=[9], offsets=[0, 36])}, bytes(8)),
        "E_SAFETENSORS", "past the end"),
    "trailing bytes": (
        lambda d: raw(d, {"w": entry()}, bytes(9)), "E_SAFETENSORS", "follow the last"),
    "no tensors": (lambda d: raw(d, {}), "E_EMPTY", "model.safetensors"),
    "metadata of numbers": (
        lambda d: raw(d, {"__metadata__": {"a": 1}}), "E_SAFETENSORS", "__metadata__"),
    "format tf": (
        lambda d: raw(d, {"__metadata__": {"format": "tf"}, "w": entry()}, bytes(8)),
        "E_FORMAT", "'tf'"),
    "pointer out of the directory": (
        lambda d: pointer(d, "../outside/evil.safetensors"), "E_PATH", "config.json"),
    "pointer to a pickle": (lambda d: pointer(d, "adapter_model.bin"), "E_CONFIG", "adapter"),
    "pointer is a number": (lambda d: pointer(d, 3), "E_CONFIG", "transformers_weights"),
    "pointer to nothing": (lambda d: pointer(d, "x.safetensors"), "E_MISSING_FILE", "x.safetens"),
    "config repeats a key": (
        lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "E_CONFIG", "'a'"),
}  # fmt: skip


def ints(d: Path) -> None:
    single(d, **{"up.weight": torch.ones(4, 3, dtype=torch.int16)})


def renamed(d: Path) -> None:
    save_file({"up.weight": WEIGHTS["up.weight"], "dwn.weight": WEIGHTS["down.weight"]},
              d / "model.safetensors")  # fmt: skip


def poisoned(value: float) -> torch.Tensor:
    return torch.tensor([[1.0] * 3] * 3 + [[2.0, value, 3.0]])


CONTENT: dict[str, tuple[Attack, str, str]] = {
    "integers for floats": (ints, "E_DTYPE", "int16"),
    "8 bit floats": (
        lambda d: single(d, **{"up.weight": torch.ones(4, 3).to(torch.float8_e4m3fn)}),
        "E_DTYPE", "float8"),
    "transposed": (lambda d: single(d, **{"up.weight": torch.ones(3, 4)}), "E_SHAPE", "(3, 4)"),
    "would broadcast": (lambda d: single(d, **{"up.weight": torch.ones(1)}), "E_SHAPE", "(1,)"),
    "renamed tensor": (renamed, "E_KEYS", "nearest: 'dwn.weight'"),
    "tensor missing": (
        lambda d: save_file({"up.weight": WEIGHTS["up.weight"]}, d / "model.safetensors"),
        "E_KEYS", "missing 'down.weight'"),
    "one layer more": (
        lambda d: single(d, **{"more.weight": torch.ones(2)}), "E_KEYS", "'more.weight'"),
    "another model": (
        lambda d: save_file({"a": torch.ones(2), "b": torch.ones(2)}, d / "model.safetensors"),
        "E_ARCHITECTURE", "different architecture"),
    "NaN": (lambda d: single(d, **{"up.weight": poisoned(float("nan"))}), "E_NONFINITE", "up.w"),
    "Inf": (lambda d: single(d, **{"up.weight": poisoned(float("-inf"))}), "E_NONFINITE", "up.w"),
}  # fmt: skip


def refused(action: Callable[[], Any]) -> CheckpointError:
    """The error that `action` raises within the time limit; a hang fails instead of blocking."""
    caught: list[BaseException | None] = []

    def work() -> None:
        try:
            action()
            caught.append(None)
        except BaseException as error:  # noqa: BLE001
            caught.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TIME_LIMIT_S)
    assert caught, "hangs"
    assert isinstance(caught[0], CheckpointError), f"{type(caught[0])}: {caught[0]}"
    return caught[0]


def names_the_fault(error: CheckpointError, code: str, expected: str, directory: Path) -> None:
    assert error.code == code and str(error).startswith(f"{code}: ")
    assert expected in str(error)
    assert str(directory) in str(error)
    assert error.file is not None and error.file.is_relative_to(directory)


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_is_refused_before_reading(name: str, tmp_path: Path) -> None:
    attack, code, expected = STRUCTURE[name]
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    attack(directory)
    error = refused(lambda: Checkpoint.open(directory))
    names_the_fault(error, code, expected, directory)


@pytest.mark.parametrize("name", CONTENT)
def test_content_is_refused_with_nothing_loaded(name: str, tmp_path: Path) -> None:
    attack, code, expected = CONTENT[name]
    attack(tmp_path)
    with torch.device("meta"):
        model = Net()
    checkpoint = Checkpoint.open(tmp_path)
    error = refused(
        lambda: load_into(model, checkpoint, dtype=None, device="cpu", tied={}, prefix="")
    )
    names_the_fault(error, code, expected, tmp_path)
    assert error.key is not None or code == "E_ARCHITECTURE"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert refused(lambda: Checkpoint.open(tmp_path)).code == "E_PICKLE"
    assert not (tmp_path / "ran").exists()


def test_stale_index_is_ignored_with_a_warning(tmp_path: Path) -> None:
    both_layouts(tmp_path)
    (tmp_path / A).unlink()
    (tmp_path / B).unlink()
    with pytest.warns(CheckpointWarning, match="out of date"):
        assert set(Checkpoint.open(tmp_path).tensors) == set(WEIGHTS)


def test_stray_shard_is_ignored_with_a_warning(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.warns(CheckpointWarning, match="model-00003"):
        assert set(Checkpoint.open(tmp_path).tensors) == set(WEIGHTS)
