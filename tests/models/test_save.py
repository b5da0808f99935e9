"""Saving: the Hugging Face layout, and old or new but never a mixture when killed at any step.

Run as a program, this file is the process that is killed: see `die_at_every_step`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from swathe.modeling.checkpoint import writer
from swathe.modeling.checkpoint.reader import Checkpoint
from swathe.modeling.checkpoint.serialize import parse_size
from swathe.modeling.checkpoint.writer import save

ROOT = Path(__file__).parents[2]
CONFIG = '{"model_type": "llama"}\n'
INDEX = "model.safetensors.index.json"


def some_tensors(scale: float = 1.0) -> dict[str, Tensor]:
    return {
        "a.weight": torch.full((4, 6), scale),
        "b.weight": torch.full((7,), scale, dtype=torch.bfloat16),
        "c.weight": torch.full((2, 3, 5), scale, dtype=torch.float16),
        "d.count": torch.tensor(3),
    }


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def stored(directory: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_single_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    files = save(tmp_path / "new" / "dir", config_json=CONFIG, tensors=tensors)
    assert files == [tmp_path / "new" / "dir" / "model.safetensors"]
    assert names(files[0].parent) == {"config.json", "model.safetensors"}
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    assert_same(stored(files[0].parent), tensors)
    assert (files[0].parent / "config.json").read_text() == CONFIG


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    files = save(tmp_path, config_json=CONFIG, tensors=tensors, max_shard_size=100)
    assert [f.name for f in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in tensors.values()),
        "total_parameters": sum(t.numel() for t in tensors.values()),
    }
    assert list(index["weight_map"]) == list(tensors)
    assert_same(stored(tmp_path), tensors)


@pytest.mark.parametrize("first", ["100", 10**9])
@pytest.mark.parametrize("then", ["60", "100", 10**9])
def test_saving_over_leaves_nothing_stale(tmp_path: Path, first: Any, then: Any) -> None:
    def size(text: Any) -> int:
        return int(text)

    save(tmp_path, config_json=CONFIG, tensors=some_tensors(1), max_shard_size=size(first))
    (tmp_path / "tokenizer.json").write_text("{}")
    files = save(tmp_path, config_json=CONFIG, tensors=some_tensors(2), max_shard_size=size(then))
    expected = {"config.json", "tokenizer.json", *(f.name for f in files)}
    assert names(tmp_path) == expected | ({INDEX} if len(files) > 1 else set())
    assert_same(stored(tmp_path), some_tensors(2))


def test_views_strides_and_empty_tensors(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    tensors = {
        "top": whole[:3],
        "rest": whole[3:],
        "t": torch.randn(5, 2).T,
        "e": whole[:0].clone(),
    }
    save(tmp_path, config_json=CONFIG, tensors=tensors)
    assert_same(stored(tmp_path), tensors)


def test_file_rights_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path, config_json=CONFIG, tensors=some_tensors())
        save(tmp_path, config_json=CONFIG, tensors=some_tensors())
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_extra_files(tmp_path: Path) -> None:
    extra = {"generation_config.json": "{}", "blob": b"\0"}
    save(tmp_path, config_json=CONFIG, tensors=some_tensors(), extra_files=extra)
    assert names(tmp_path) == {"config.json", "model.safetensors", *extra}
    for bad in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match="extra_files has"):
            save(tmp_path, config_json=CONFIG, tensors=some_tensors(), extra_files={bad: ""})
    with pytest.raises(ValueError, match="E_PATH"):
        save(tmp_path, config_json=CONFIG, tensors=some_tensors(), extra_files={"../x": ""})


def test_a_leftover_pointer_is_dropped(tmp_path: Path) -> None:
    config = json.dumps({"model_type": "llama", "transformers_weights": "old.safetensors"})
    save(tmp_path, config_json=config, tensors=some_tensors())
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("5GB", 5 * 10**9), ("2.5 kB", 2500), ("1GiB", 2**30), ("12 mib", 12 * 2**20)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, "GB", "5 furlongs", "0GB", ""])
def test_sizes_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size is"):
        save(tmp_path / "x", config_json=CONFIG, tensors=some_tensors(), max_shard_size=size)
    assert not names(tmp_path)


SHARED = torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "empty"),
    "tied": ({"a": SHARED, "b": SHARED}, "'a' and 'b' share memory"),
    "overlapping": ({"a": SHARED[:3], "b": SHARED[2:]}, "'a' and 'b' share memory"),
    "meta": ({"a": torch.ones(1, device="meta")}, "'a' is on the meta device"),
    "complex": ({"a": torch.ones(1, dtype=torch.complex64)}, "'a' is .*complex64"),
    "sparse": ({"a": torch.eye(2).to_sparse_coo()}, "'a' is torch.sparse_coo"),
    "reserved name": ({"__metadata__": SHARED}, "__metadata__"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "x", config_json=CONFIG, tensors=tensors)
    assert not names(tmp_path)


def test_bad_config_and_bad_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        save(tmp_path / "x", config_json="{", tensors=some_tensors())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file; give a directory"):
        save(tmp_path / "file", config_json=CONFIG, tensors=some_tensors())
    assert names(tmp_path) == {"file"}


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, config_json=CONFIG, tensors=some_tensors(1))
    before = names(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="1000 are free; nothing was written") as caught:
        save(tmp_path, config_json=CONFIG, tensors=some_tensors(2))
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == before
    with pytest.raises(OSError, match="are free"):
        save(tmp_path / "new", config_json=CONFIG, tensors=some_tensors(2))
    assert not (tmp_path / "new").exists()
    assert_same(stored(tmp_path), some_tensors(1))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    save(tmp_path, config_json=CONFIG, tensors=some_tensors(1))
    with writer._only_writer(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        save(tmp_path, config_json=CONFIG, tensors=some_tensors(2))
    assert_same(stored(tmp_path), some_tensors(1))


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    save(tmp_path, config_json=CONFIG, tensors=some_tensors(1))
    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, config_json=CONFIG, tensors=some_tensors(2))
    assert names(tmp_path) == {"config.json", "model.safetensors"}
    assert_same(stored(tmp_path), some_tensors(2))


CALLS = ("open", "fsync", "link", "replace", "unlink")


def count_calls(action: Callable[[int], None]) -> None:
    """Call `action` with 0, 1, 2, ... before and after every system call that changes a file."""
    seen = 0

    def step() -> None:
        nonlocal seen
        seen += 1
        action(seen - 1)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            step()
            result = call(*args, **kwargs)
            step()
            return result

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("shard_size", [100, 10**9])
def test_an_error_at_any_step_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, shard_size: int
) -> None:
    def fail(at: int) -> Callable[[int], None]:
        def action(step: int) -> None:
            if step == at:
                raise OSError(errno.EIO, "planted")

        return action

    outcomes = set()
    for at in range(300):
        directory = tmp_path / str(at)
        if not fresh:
            save(directory, config_json='{"v": 1}', tensors=some_tensors(1))
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, getattr(os, name))
            count_calls(fail(at))
            try:
                save(directory, config_json='{"v": 2}', tensors=some_tensors(2),
                     max_shard_size=shard_size)  # fmt: skip
                outcomes.add("done")
                break
            except OSError as error:
                assert "planted" in str(error)
                committed = bool(getattr(error, "__notes__", []))
        if committed:
            assert_same(stored(directory), some_tensors(2))
            assert json.loads((directory / "config.json").read_text())["v"] == 2
        elif fresh:
            assert not directory.exists() or not names(directory)
        else:
            assert names(directory) == {"config.json", "model.safetensors"}
            assert_same(stored(directory), some_tensors(1))
        outcomes.add(committed)
    assert outcomes == ({False, "done"} if fresh else {False, True, "done"})


def die_at_every_step(old: str, new: str, out: str, shard_size: int) -> None:
    """Save the weights of `new` over copies of `old`, one copy for each step, and die there."""
    source = Checkpoint.open(new)
    tensors = {name: source.read(name) for name in source.tensors}
    config = (Path(new) / "config.json").read_text()
    for at in range(300):
        directory = Path(out) / f"{at:03d}"
        if old:
            shutil.copytree(old, directory)
        child = os.fork()
        if child == 0:
            count_calls(
                lambda step, at=at: os.kill(os.getpid(), signal.SIGKILL) if step == at else 0
            )
            save(directory, config_json=config, tensors=tensors, max_shard_size=shard_size)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    die_at_every_step(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    sys.exit()


def hf_model(directory: Path, value: float, layers: int, shard_size: str) -> Path:
    """A transformers checkpoint, written by transformers, all of whose weights are `value`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def what_transformers_loads(directory: Path) -> tuple[int, float] | None:
    """(layers, value) when everything fits and agrees; None when there is no checkpoint yet."""
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").exists():
        return None
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    values = {float(v) for p in model.parameters() for v in p.detach().unique()}
    assert len(values) == 1, f"{directory}: mixed weights {values}"
    return model.config.num_hidden_layers, values.pop()


def what_we_load(directory: Path) -> tuple[int, float] | None:
    if not (directory / "config.json").exists():
        return None
    config = json.loads((directory / "config.json").read_text())
    values = {float(v) for tensor in stored(directory).values() for v in tensor.unique()}
    assert len(values) == 1, f"{directory}: mixed weights {values}"
    return config["num_hidden_layers"], values.pop()


def test_an_absent_generation_config_stays_absent(tmp_path: Path) -> None:
    """An empty one would hide config.json's EOS from transformers."""
    from transformers import LlamaForCausalLM as Theirs

    from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

    hf_model(tmp_path / "a", 1.0, 1, "50GB")
    (tmp_path / "a" / "generation_config.json").unlink()
    LlamaForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert Theirs.from_pretrained(tmp_path / "b").generation_config.eos_token_id == 2


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::swathe.modeling.checkpoint.errors.CheckpointWarning")
@pytest.mark.parametrize("old_size", [None, "50GB", "9KB"])
@pytest.mark.parametrize("new_size", [10**9, 12_000])
def test_killed_at_any_step(tmp_path: Path, old_size: str | None, new_size: int) -> None:
    pytest.importorskip("transformers", reason="the stock reader is the judge here")
    old = "" if old_size is None else str(hf_model(tmp_path / "old", 1.0, 3, old_size))
    new = hf_model(tmp_path / "new", 2.0, 2, "50GB")
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [sys.executable, __file__, old, str(new), str(out), str(new_size)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    steps = sorted(out.iterdir())
    found = [what_transformers_loads(step) for step in steps]
    assert found == [what_we_load(step) for step in steps]
    before, after = None if old_size is None else (3, 1.0), (2, 2.0)
    commit = found.index(after)
    assert found == [before] * commit + [after] * (len(found) - commit)
    assert 0 < commit < len(found) - 1 and len(found) > 20

    # the next save tidies up whatever the dead one left
    for step in (steps[commit - 1], steps[commit], steps[-2]):
        save(step, config_json=CONFIG, tensors=some_tensors())
        assert names(step) <= {"config.json", "model.safetensors", "generation_config.json"}
