"""Finding a configuration and its classes: missing and hostile files, saving, registration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from swathe.modeling.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    model_types,
    register_model,
)
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig


def written(directory: Path, **values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return directory


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match=r"it holds \['model.safetensors'\]. Needed: a local"
    ):
        LlamaConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        AutoConfig.from_pretrained(tmp_path / "nowhere")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "list": (b"[1]", "expected a JSON object, got a list"),
    "truncated": (b'{"model_type": "lla', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "binary": (b"\xff\xfe\x00", "not valid JSON"),
    "twice": (
        b'{"model_type": "llama", "num_hidden_layers": 2, "num_hidden_layers": 1}',
        r"key 'num_hidden_layers' appears twice",
    ),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
    "very deep": (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply"),
    "no type": (b"{}", "model_type None is not known"),
    "wrong type": (b'{"model_type": ["llama"]}', "is not known"),
    "near type": (b'{"model_type": "lama"}', r"'lama' is not known \(did you mean 'llama'\?\)"),
    "path type": (b'{"model_type": "../llama"}', "is not known"),
    "code": (b'{"model_type": "x", "auto_map": {}}', "Code shipped with a checkpoint is never run"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert str(file) in str(caught.value)


def test_a_config_that_is_no_file_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="expected a regular file"):
        AutoConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match="at most 16777216 bytes, got 1073741824"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_file_of_another_model_type(tmp_path: Path) -> None:
    written(tmp_path, model_type="mistral", vocab_size=10)
    with pytest.raises(ConfigError, match="model_type='mistral', but LlamaConfig reads 'llama'"):
        LlamaConfig.from_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path, allow_model_type_mismatch=True)
    assert config.vocab_size == 10 and config.model_type == "llama"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig(vocab_size=5).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "config.json").stat().st_mode & 0o044 == 0o044 & ~_umask()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        LlamaConfig(vocab_size=6).save_pretrained(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]
    assert LlamaConfig.from_pretrained(tmp_path / "new").vocab_size == 5
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; save_pretrained needs a directory"):
        LlamaConfig().save_pretrained(tmp_path / "file")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_auto_classes_and_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})
    assert {"bert", "llama"} <= set(model_types())
    assert isinstance(AutoConfig.for_model("llama", vocab_size=9), LlamaConfig)
    small = LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    assert type(AutoModel.from_config(small)).__name__ == "LlamaModel"
    assert type(AutoModelForCausalLM.from_config(small)).__name__ == "LlamaForCausalLM"
    with pytest.raises(TypeError, match=r"use AutoModel.from_pretrained\(directory\)"):
        AutoModel()

    class MineConfig(DecoderConfig):
        model_type: ClassVar[str] = "mine"

    register_model("mine", MineConfig, {})
    assert isinstance(AutoConfig.for_model("mine"), MineConfig)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: register_model("mine", MineConfig, {}), "model_type 'mine' exists"),
        (lambda: register_model("other", MineConfig, {}), "both must be the same"),
        (
            lambda: register_model("mine", MineConfig, {"causal": AutoModel}),
            "did you mean 'causal_",
        ),
        (lambda: AutoModel.from_config(MineConfig()), "'mine' has no class for 'base'"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_families_are_imported_on_demand_and_never_transformers() -> None:
    code = (
        "import sys, swathe.modeling as m\n"
        "m.AutoConfig, m.AutoModelForCausalLM, m.PreTrainedModel\n"
        "assert not [n for n in sys.modules if n.startswith('swathe.modeling.families.')]\n"
        "m.AutoConfig.for_model('llama')\n"
        "assert not [n for n in sys.modules if 'modeling_llama' in n]\n"
        "m.LlamaForCausalLM\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('transformers', 'triton')])\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    import swathe.modeling

    with pytest.raises(AttributeError, match="has no attribute 'LammaModel'"):
        _ = swathe.modeling.LammaModel
