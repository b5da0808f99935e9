"""Which kernels serve "triton" on Hopper: tables, what overrules them, what they may not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swathe.kernels.attention import paths

Q = torch.empty(1, 2, 3, 128)
GPU = torch.device("cuda")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables, and a Hopper GPU to read them."""
    monkeypatch.setattr(paths, "HOME", tmp_path)
    monkeypatch.setattr(paths, "arch", lambda device: 90)
    monkeypatch.setattr(paths, "device_slug", lambda device: "nvidia_h200")
    paths._looked_up.cache_clear()
    yield tmp_path
    paths._looked_up.cache_clear()


def test_a_table_is_read_back(home: Path) -> None:
    table = {("forward", 128, 128): "gluon", ("backward", 64, 64): "portable"}
    paths.write(home / "nvidia_h200.json", table, {"commit": "abc"})
    assert paths.read(home / "nvidia_h200.json") == table
    assert paths._looked_up("forward", 128, 128, GPU) == "gluon"
    assert paths._looked_up("backward", 64, 64, GPU) == "portable"
    assert paths._looked_up("forward", 128, 64, GPU) == "portable"
    assert paths.path("forward", Q, Q) == "portable"  # on a CPU


def test_no_table_is_portable(home: Path) -> None:
    assert paths._looked_up("forward", 128, 128, GPU) == "portable"


def test_another_generation_reads_no_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.write(home / "nvidia_h200.json", {("forward", 128, 128): "gluon"}, {})
    monkeypatch.setattr(paths, "arch", lambda device: 100)
    assert paths._looked_up("forward", 128, 128, GPU) == "portable"


def test_forced_for_a_while(home: Path) -> None:
    with paths.forced("gluon"):
        assert paths.path("decode", Q, Q) == "gluon"
        with paths.forced(None):
            assert paths.path("decode", Q, Q) == "portable"
    assert paths.path("decode", Q, Q) == "portable"


def test_one_pass_is_a_path_of_the_backward_alone(home: Path) -> None:
    with paths.forced("gluon_fused"):
        taken = [paths.path(which, Q, Q) for which in paths.PASSES]
    assert taken == ["gluon", "gluon_fused", "gluon"]
    paths.write(home / "nvidia_h200.json", {("backward", 128, 128): "gluon_fused"}, {})
    assert paths._looked_up("backward", 128, 128, GPU) == "gluon_fused"


@pytest.mark.parametrize(
    "document",
    [
        {"schema": 0, "rows": []},
        {"schema": 1},
        {"schema": 1, "rows": [{"pass": "sideways", "D": 1, "E": 1, "path": "gluon"}]},
        {"schema": 1, "rows": [{"pass": "forward", "D": 1, "E": 1, "path": "fast"}]},
        {"schema": 1, "rows": [{"pass": "forward", "D": 1, "E": 1, "path": "gluon_fused"}]},
    ],
)
def test_what_is_no_table_is_refused(document: object, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"x\.json"):
        paths.read(tmp_path / "x.json")


@pytest.mark.parametrize("given", paths.PATHS)
def test_the_environment_overrules(given: str) -> None:
    assert imported_under(given).stdout.split() == [given]


def test_an_unknown_path_says_what_is_allowed() -> None:
    assert "allowed: portable or gluon or gluon_fused" in imported_under("fast").stderr


def imported_under(given: str) -> subprocess.CompletedProcess[str]:
    code = "from swathe.kernels.attention import paths; print(paths._forced)"
    environment = {**os.environ, paths.VARIABLE: given}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
