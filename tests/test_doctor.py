"""`python -m swathe doctor`: true of an installation that works, plain about one that does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

import swathe
from swathe import doctor
from swathe.kernels import installation
from swathe.kernels.catalog import OPS, backends
from swathe.kernels.core import cpp

ROOT = Path(__file__).parents[1]
BUILT = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)


def run(
    *options: str, cwd: Path = ROOT, hide: str = "", env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the package `hide` cannot be imported."""
    code = "import sys; sys.modules[sys.argv.pop()] = None; from swathe.__main__ import main; "
    start = ["-c", f"{code} sys.exit(main(sys.argv[1:]))"] if hide else ["-m", "swathe"]
    done = subprocess.run(
        [sys.executable, *start, "doctor", *options, *([hide] if hide else [])],
        cwd=cwd,
        env={**os.environ, "TRITON_INTERPRET": "0", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def facts(**environment: str) -> dict[str, Any]:
    return json.loads(run("--json", env=environment).stdout)


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder whose swathe has no compiled library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "swathe", tmp_path / "swathe", ignore=ignored)
    return tmp_path


def library_of(folder: Path) -> Path:
    return folder / "swathe" / f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"


@BUILT
def test_where_everything_works() -> None:
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    assert f"swathe {swathe.__version__}, python {sys.version.split()[0]}" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert f"{cpp.isa()}, " in done.stdout and str(cpp.library_path()) in done.stdout
    assert done.stdout.endswith("All is well.\n")


@BUILT
def test_json_says_what_the_library_and_auto_say() -> None:
    found = facts()
    assert found["problems"] == []
    assert found["library"] == {
        "path": str(cpp.library_path()),
        "abi": cpp.ABI_VERSION,
        "openmp": cpp.library().swathe_threaded() == 1,
        "isa": cpp.isa(),
        "problem": None,
    }
    assert list(found["ops"]) == sorted(OPS)
    for op, said in found["ops"].items():
        assert set(said["backends"]) == set(backends(op)[op])
    # what a call itself chooses
    x, weight = torch.ones(2, 2048), torch.ones(2048)
    choice = swathe.kernels.norm.api.resolve_rms_norm(x, weight, grad=True)
    assert found["ops"]["rms_norm"]["auto"]["cpu"]["fp32"]["training"] == choice.backend
    x, weight = x.bfloat16(), weight.bfloat16()
    for mode, grad in (("inference", False), ("training", True)):
        choice = swathe.kernels.layer_norm.api.resolve_layer_norm(x, weight, grad=grad)
        assert found["ops"]["layer_norm"]["auto"]["cpu"]["bf16"][mode] == choice.backend


def test_no_library(unbuilt: Path) -> None:
    done = run(cwd=unbuilt)
    assert done.returncode == 1
    assert done.stdout.count("PROBLEM: ") == 1
    assert "PROBLEM: the C++ library was not compiled; run `pip install" in done.stdout
    norm = json.loads(run("--json", cwd=unbuilt).stdout)["ops"]["rms_norm"]
    assert norm["auto"]["cpu"]["bf16"]["inference"] == "eager"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_library_of_another_version(unbuilt: Path) -> None:
    source = unbuilt / "other.cpp"
    source.write_text('extern "C" int swathe_abi_version() { return 999; }')
    command = ["c++", "-shared", "-fPIC", "-o", str(library_of(unbuilt)), str(source)]
    subprocess.run(command, check=True, timeout=120)
    done = run(cwd=unbuilt)
    assert done.returncode == 1
    assert f"has ABI version 999, this swathe needs {cpp.ABI_VERSION}" in done.stdout
    assert "run `pip install" in done.stdout and str(library_of(unbuilt)) in done.stdout


@BUILT
@pytest.mark.parametrize("damage", ["empty", "noise", "cut short"])
def test_a_damaged_library(unbuilt: Path, damage: str) -> None:
    whole = Path(str(cpp.library_path())).read_bytes()
    content = {"empty": b"", "noise": b"\x7fELF" + bytes(range(256)), "cut short": whole[:5000]}
    library_of(unbuilt).write_bytes(content[damage])
    done = run(cwd=unbuilt)
    assert done.returncode == 1
    assert done.stdout.count("cannot be loaded") == 2  # a backend's reason, and the problem
    assert "run `pip install" in done.stdout


def test_a_library_that_was_asked_for_and_is_not_there(tmp_path: Path) -> None:
    done = run("--json", env={"SWATHE_CSRC": str(tmp_path / "none.so")})
    found = json.loads(done.stdout)
    assert done.returncode == 1
    (problem,) = found["problems"]
    assert "SWATHE_CSRC" in problem and "unset it" in problem
    norm = found["ops"]["rms_norm"]
    assert norm["backends"]["cpp"] == problem and norm["backends"]["eager"] == "ok"
    assert norm["auto"]["cpu"]["fp32"]["inference"] is None, "auto does not go on in silence"


@BUILT
def test_without_triton() -> None:
    done = run(hide="triton")
    assert done.returncode == (1 if torch.cuda.is_available() else 0)
    assert "the package triton is not installed (pip install triton)" in done.stdout


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_without_torch(option: tuple[str, ...]) -> None:
    done = run(*option, hide="torch")
    assert done.returncode == 1
    assert "torch cannot be imported" in done.stdout and "install torch" in done.stdout


def test_how_triton_runs_and_where_it_caches(tmp_path: Path) -> None:
    knobs = pytest.importorskip("triton").knobs
    if "TRITON_CACHE_DIR" not in os.environ:
        assert installation.triton_facts()["cache"] == knobs.cache.dir
    found = facts(TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))["triton"]
    assert found == {"problem": None, "interpreting": True, "cache": str(tmp_path)}
    assert facts(TRITON_HOME=str(tmp_path))["triton"]["cache"].startswith(str(tmp_path))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper, a Turing, which Triton kernels are too new for, and one that cannot be used."""

    def properties(index: int) -> SimpleNamespace:
        if index == 2:
            raise RuntimeError("CUDA error: all devices are busy\nmore of it")
        return SimpleNamespace(name=("NVIDIA H100", "NVIDIA T4")[index])

    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    monkeypatch.setattr(torch.version, "hip", None)
    installation.arch.cache_clear()
    yield
    installation.arch.cache_clear()


@pytest.mark.usefixtures("gpus")
def test_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "cuda:0    NVIDIA H100, sm_90" in out
    assert "PROBLEM: GPU 2: CUDA error: all devices are busy\n" in out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert table["auto"] == ["takes", "cpu", "cuda:0", "cuda:1"]
    found = installation.op_facts("rotary", ["cuda:0", "cuda:1"])
    assert found["auto"]["cuda:0"]["bf16"] == {"inference": "triton", "training": "triton"}
    assert found["auto"]["cuda:1"]["bf16"] == {"inference": "eager", "training": "eager"}


@pytest.mark.parametrize(
    ("four", "said"),
    [
        (("cpp", "cpp", "cpp", "cpp"), "cpp"),
        (("cpp", "sdpa", "cpp", "sdpa"), "inference cpp, training sdpa"),
        (("cpp", "cpp", "sdpa", "sdpa"), "fp32 cpp, bf16 sdpa"),
        (("cpp", "cpp", "cpp", None), "cpp, bf16 training nothing"),
    ],
)
def test_cells_say_a_thing_once(four: tuple[str | None, ...], said: str) -> None:
    a, b, c, d = four
    auto = {"fp32": {"inference": a, "training": b}, "bf16": {"inference": c, "training": d}}
    assert doctor.summary(auto) == said


def test_help_and_wrong_options() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and "python -m swathe doctor [--json]" in shown.stdout
    wrong = run("--jsn")
    assert wrong.returncode == 2 and "unrecognized arguments: --jsn" in wrong.stderr
