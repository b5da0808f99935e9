"""Models patched as they are made: of a type, all of them, by swathe.auto, by the command `run`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import swathe
from support.families import TINY, tokens
from swathe.modeling.hf.patching.patch import holders

BEFORE = {
    name: vars(transformers.PreTrainedModel)[name] for name in ("from_pretrained", "post_init")
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    now = {name: vars(transformers.PreTrainedModel)[name] for name in BEFORE}
    assert all(now[name] is BEFORE[name] for name in BEFORE)


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes}))


def is_patched(model: nn.Module) -> bool:
    return [*holders(model)] == [model]


def test_a_model_that_is_built() -> None:
    existing = llama()
    with swathe.patch("llama") as creation:
        made = llama()
        other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY))
        by_auto = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY))
    assert is_patched(made) and is_patched(by_auto)
    assert not holders(existing) and not holders(other) and not holders(llama())
    assert [name for name, _ in creation.reports] == ["LlamaForCausalLM"] * 2
    # two norms and an MLP in each of four layers, and the last norm
    counts = creation.reports[0][1].counts()
    assert counts["rms_norm"] == {"patched": 9, "left": 0}
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, existing(ids).logits, atol=1e-5, rtol=1e-5)
    swathe.unpatch(made)
    assert not holders(made)


def test_a_model_that_is_loaded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with swathe.patch(all=True) as creation:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        body = transformers.AutoModel.from_pretrained(tmp_path)
    assert is_patched(loaded) and is_patched(body) and not info["missing_keys"]
    assert [name for name, _ in creation.reports] == ["LlamaForCausalLM", "LlamaModel"]


def test_on_meta_nothing_is_patched() -> None:
    with swathe.patch(all=True) as creation, torch.device("meta"):
        model = llama()
    assert not holders(model) and creation.reports == []


def test_what_was_asked_for_last_comes_first_and_ends_alone() -> None:
    everything = swathe.patch(all=True)
    swathe.patch("llama", rms_norm=False, residual=False)
    assert "rms_norm" not in holders(llama())[0]._swathe_patch.report.counts()  # type: ignore
    swathe.unpatch("llama")
    assert "rms_norm" in holders(llama())[0]._swathe_patch.report.counts()  # type: ignore
    with pytest.raises(ValueError, match=r"llama are not patched as they are made.*\['all'\]"):
        swathe.unpatch("llama")
    swathe.unpatch(all=True)
    everything.stop()  # a second end is none


def test_several_types_are_ended_as_they_were_asked_for() -> None:
    swathe.patch(("llama", "qwen2"))
    assert is_patched(llama())
    swathe.unpatch(("qwen2", "llama"))
    assert not holders(llama())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("lama",), ValueError, r"no model_type 'lama'.*'llama'"),
        ((3,), TypeError, r"given a int; it takes a model of transformers"),
        (((),), TypeError, r"given a tuple"),
        ((), TypeError, r"given a NoneType"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        swathe.patch(*arguments)
    with pytest.raises(ValueError, match="backend='cudnn'"):
        swathe.patch("llama", backend="cudnn")
    with pytest.raises(TypeError, match="unknown option 'ropes'"):
        swathe.patch("llama", ropes=False)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="and all=True"):
        swathe.patch("llama", all=True)  # type: ignore[call-overload]


SCRIPT = """
import sys
import transformers
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
print(__name__, sys.argv[1:], hasattr(model, "_swathe_patch"))
raise SystemExit(3)
"""


def test_the_command_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = ["--report", "--no-rope", str(script), "--lr", "1"]
    command = [sys.executable, "-m", "swathe", "run", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stderr
    assert run.stdout.strip() == "__main__ ['--lr', '1'] True"
    assert "LlamaForCausalLM:" in run.stderr and "rms_norm" in run.stderr
    assert "rotary" not in run.stderr


def test_the_import(tmp_path: Path) -> None:
    code = "import swathe.auto\n" + SCRIPT.replace("raise SystemExit(3)", "")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "__main__ [] True", run.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["no_such.py"], "no_such.py: there is no such file"),
        (["--model-type", "lama", __file__], "no model_type 'lama' (did you mean 'llama'?)"),
        (["--backend", "cp", __file__], "backend='cp' (did you mean 'cpp'?)"),
    ],
)
def test_the_command_says_what_is_wrong(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from swathe import run

    with pytest.raises(SystemExit) as stop:
        run.main(given)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
