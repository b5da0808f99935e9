"""The table of changed baselines, between two revisions of a small repository."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import gate, proxies

FACTS = {"occupancy": 8, "shared": 1024, "loads": 4, "stores": 2, "instructions": 100}


def commit(root: Path, **ops: dict[str, Any]) -> None:
    folder = root / proxies.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for op, baseline in ops.items():
        (folder / f"{op}.json").write_text(json.dumps(baseline))
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "--no-verify", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)


def test_what_changed_is_listed_worst_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"kept sm_90": FACTS, "lost sm_90": FACTS, "tuned sm_90": FACTS, "slow sm_80": FACTS}
    commit(tmp_path, norm={"3.6": kept, "3.9": {"kept sm_90": FACTS}}, gone={"3.6": {"a": FACTS}})
    now = {
        "kept sm_90": FACTS,
        "tuned sm_90": {**FACTS, "occupancy": 16, "shared": 512},
        "slow sm_80": {**FACTS, "occupancy": 4, "instructions": 101},
        "added sm_90": {**FACTS, "in_flight": 3},
    }
    commit(tmp_path, norm={"3.6": now, "3.9": {"kept sm_90": FACTS}})
    assert proxies.main(["HEAD~1"], tmp_path) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["worse", "norm", "3.6", "occupancy", "8", "4", "slow", "sm_80"],
        ["worse", "norm", "3.6", "instructions", "100", "101", "slow", "sm_80"],
        ["better", "norm", "3.6", "occupancy", "8", "16", "tuned", "sm_90"],
        ["better", "norm", "3.6", "shared", "1024", "512", "tuned", "sm_90"],
        ["new", "norm", "3.6", "all", "-", "6", "added", "sm_90"],
        ["gone", "gone", "3.6", "all", "5", "-", "a"],
        ["gone", "norm", "3.6", "all", "5", "-", "lost", "sm_90"],
        [],
        ["2", "worse,", "2", "better,", "1", "new,", "2", "gone"],
    ]
    assert proxies.main(["HEAD"], tmp_path) == 0
    assert capsys.readouterr().out == "no kernel's baseline changed\n"


def test_unknown_revisions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(tmp_path, norm={})
    assert proxies.main(["no-such-branch"], tmp_path) == 2
    assert "no-such-branch; give a known revision" in capsys.readouterr().err
    assert proxies.main([], tmp_path) == 2


def test_better_means_what_the_gate_means() -> None:
    assert proxies.MORE_IS_BETTER is gate.MORE_IS_BETTER
    assert (proxies.ROOT / proxies.FOLDER).samefile(gate.OFFLINE / "baselines")
