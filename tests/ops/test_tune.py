"""Tuned block sizes: tried candidates are checked, tables are found, and a table cannot break."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import swathe
from support.tensors import DEVICE, rows
from swathe.kernels import tuner
from swathe.kernels.core import tune
from swathe.kernels.core.tune import Blocks, Tunable, around
from swathe.kernels.norm import _triton as norm
from swathe.kernels.norm.contract import CONTRACT, random
from swathe.kernels.norm.shapes import Shape

GPU = torch.device("cuda", 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner's problem in a size that the interpreter can take."""

    def tuning(N: int, dtype: torch.dtype, device: str) -> Any:
        return random(Shape("tuning", 5, N), dtype, seed=0, device=device, residual=True)

    contract = replace(CONTRACT, tuning=tuning, tuning_sizes=(64, 128))
    monkeypatch.setattr(tuner, "contract_of", lambda op: contract)


def pretend(fastest: Blocks, tunable: Tunable) -> Any:
    """A timer that finds one choice of blocks fast."""
    return lambda call: 1.0 if tunable._forced == fastest else 2.0


@pytest.mark.usefixtures("small")
def test_the_fastest_right_candidate_gets_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    best = around(norm.forward_blocks(128))[-1]
    timer = pretend(best, norm.FORWARD)
    found = tuner.tune("rms_norm", ["bfloat16"], device=DEVICE, timer=timer)
    assert [(r["kernel"], r["columns_up_to"]) for r in found] == [
        (kernel, N) for kernel in ("forward", "backward") for N in (64, 128)
    ]
    row = next(r for r in found if (r["kernel"], r["columns_up_to"]) == ("forward", 128))
    assert Blocks(*row["blocks"]) == best and row["us"] == 1.0 and row["itemsize"] == 2


@pytest.mark.usefixtures("small")
def test_a_wrong_candidate_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Blocks(8, 32, 1)  # narrower than the row
    monkeypatch.setattr(norm.FORWARD, "candidates", lambda N: (wrong,))
    found = tuner.tune("rms_norm", ["float32"], device=DEVICE, timer=pretend(wrong, norm.FORWARD))
    assert all(Blocks(*row["blocks"]) != wrong for row in found)
    assert "64 (8, 32, 1): h tuning: is not x + residual" in capsys.readouterr().out


def test_candidates_are_right_for_every_row_length() -> None:
    for N in (1, 37, 64, 576, 4096):
        problem = random(Shape("tried", 5, N), torch.float32, seed=N, device=DEVICE, residual=True)
        expected = problem.run(CONTRACT.on("triton"))
        for tunable in (norm.FORWARD, norm.BACKWARD):
            for blocks in tunable.candidates(N):
                with tunable.forced(blocks):
                    found = problem.run(CONTRACT.on("triton"))
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value)


def write(path: Path, blocks: Blocks, **changed: Any) -> Path:
    row = {"kernel": "forward", "columns_up_to": 4096, "itemsize": 2, "blocks": list(blocks)}
    document = {"schema": tune.SCHEMA, "op": "rms_norm", "rows": [row], **changed}
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_loaded", {})
    monkeypatch.setattr(tune, "device_slug", lambda device: "some_gpu")


@pytest.mark.usefixtures("forgotten")
def test_a_table_is_found_by_the_devices_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = around(norm.forward_blocks(4096))[-1]
    monkeypatch.setattr(norm.FORWARD, "_home", tmp_path)
    assert norm.FORWARD._look_up(4096, 2, GPU) == norm.forward_blocks(4096)
    write(tmp_path / "some_gpu.json", other)
    assert norm.FORWARD._look_up(4096, 2, GPU) == other
    assert norm.FORWARD._look_up(3000, 2, GPU) == other, "the same power of two"
    for N, itemsize in ((4096, 4), (2048, 2)):
        assert norm.FORWARD._look_up(N, itemsize, GPU) == norm.forward_blocks(N)
    assert norm.FORWARD._look_up(4096, 2, torch.device("cpu")) == norm.forward_blocks(4096)
    write(tmp_path / "some_gpu.json", Blocks(1, 64, 4))
    assert norm.FORWARD._look_up(4096, 2, GPU) == norm.forward_blocks(4096), "no such candidate"


@pytest.mark.usefixtures("forgotten")
def test_a_table_can_be_given(tmp_path: Path) -> None:
    other = around(norm.forward_blocks(4096))[-1]
    swathe.use_tuned(write(tmp_path / "mine.json", other))
    assert norm.FORWARD._look_up(4096, 2, GPU) == other
    with pytest.raises(ValueError, match=r"no table of tuned blocks.*python -m swathe tune"):
        swathe.use_tuned(write(tmp_path / "old.json", other, schema=0))
    with pytest.raises(ValueError, match="is for op 'conv'"):
        swathe.use_tuned(write(tmp_path / "conv.json", other, op="conv"))


def test_blocks_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = Tunable("rms_norm", "looked up", norm.forward_blocks, around)
    asked: list[int] = []
    monkeypatch.setattr(tunable, "heuristic", lambda N: asked.append(N) or norm.forward_blocks(N))
    for _ in range(3):
        tunable(64, rows(2, 64))
    assert asked == [64]
    del tune.tunables["rms_norm"]["looked up"]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to tune for")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.main(["--op", "rms_norm"]) == 2
    assert "nothing to time" in capsys.readouterr().err
    for given, said in ((["--op", "norm"], r"--op \['norm'\] unknown"), (["--dtypes", "int8"], "")):
        with pytest.raises(SystemExit):
            tuner.main(given)
        assert "unknown; allowed: " in capsys.readouterr().err, said


def test_command_line() -> None:
    run = [sys.executable, "-m", "swathe"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "python -m swathe tune" in shown.stdout
    refused = subprocess.run([*run, "tuen"], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage:" in refused.stderr


def test_a_table_can_be_given_before_any_kernel_was_used(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", norm.forward_blocks(4096))
    code = (
        f"import sys, swathe; swathe.use_tuned({str(path)!r}); assert 'triton' not in sys.modules\n"
        "from swathe.kernels.core.tune import _loaded; assert len(_loaded['rms_norm']) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to tune for")
def test_every_op_with_kernels_is_asked_in_a_process_of_its_own() -> None:
    # an op without a contract is no reason to refuse to tune another
    run = [sys.executable, "-m", "swathe", "tune"]
    for given, said in (([], "nothing to time"), (["--op", "rotary"], "['rotary'] unknown")):
        found = subprocess.run([*run, *given], capture_output=True, text=True)
        assert found.returncode == 2 and said in found.stderr, found.stderr
